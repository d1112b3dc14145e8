// The worker in Node: messages come on stdin and are answered on stdout. Ends when stdin does.
//
//   node node.mjs FOLDER THREADS     FOLDER holds node_modules/onnxruntime-web

import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

import { createSessions, decode, encode, frameLength } from "./sessions.mjs";

// The runtime prints with fs.writeSync(1, ...); stdout belongs to the messages.
const printed = [];
const writeSync = fs.writeSync;
fs.writeSync = (descriptor, text, ...rest) =>
  descriptor === 1 ? printed.push(String(text).trimEnd()) : writeSync(descriptor, text, ...rest);

const [folder, threads] = process.argv.slice(2);
const module = path.join(folder, "node_modules", "onnxruntime-web", "dist", "ort.node.min.mjs");
const ort = await import(pathToFileURL(module).href);
const answer = createSessions(ort, Number(threads), printed);

let pending = Buffer.alloc(0);
for await (const chunk of process.stdin) {
  pending = pending.length ? Buffer.concat([pending, chunk]) : chunk;
  let length = frameLength(pending);
  while (length && pending.length >= length) {
    // Not as a Buffer, whose slice() makes no copy.
    const frame = new Uint8Array(pending.buffer, pending.byteOffset, length);
    pending = pending.subarray(length);
    process.stdout.write(encode(...(await answer(...decode(frame)))));
    length = frameLength(pending);
  }
}
process.exit(0); // threads of the runtime would keep it alive
