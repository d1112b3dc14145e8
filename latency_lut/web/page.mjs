// The worker in a page: each answer is posted to the server that served the page, whose response is the next message.

import { createSessions, decode, encode } from "./sessions.mjs";

// The runtime prints with the console.log that it finds when it is loaded.
const printed = [];
console.log = (text) => printed.push(String(text));

const NO_MESSAGE_YET = 204;
const ort = await import("./ort.wasm.bundle.min.mjs");
const threads = Number(new URLSearchParams(location.search).get("threads"));
const answer = createSessions(ort, threads, printed);

let body = new Uint8Array();
for (;;) {
  const response = await fetch("next", { method: "POST", body });
  if (response.status === NO_MESSAGE_YET) {
    body = new Uint8Array();
    continue;
  }
  if (!response.ok) break;
  body = encode(...(await answer(...decode(new Uint8Array(await response.arrayBuffer())))));
}
