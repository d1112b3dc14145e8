// The worker in a page: messages come over a WebSocket from the server that served the page, and are answered there.

import { createSessions, decode, encode } from "./sessions.mjs";

// The runtime prints with the console.log that it finds when it is loaded.
const printed = [];
console.log = (text) => printed.push(String(text));

const ort = await import("./ort.wasm.bundle.min.mjs");
const threads = Number(new URLSearchParams(location.search).get("threads"));
const answer = createSessions(ort, threads, printed);

const address = new URL("socket", location.href);
address.protocol = "ws:";
const socket = new WebSocket(address);
socket.binaryType = "arraybuffer";
socket.onmessage = async ({ data }) => socket.send(encode(...(await answer(...decode(new Uint8Array(data))))));
