// Sessions of onnxruntime-web, driven by messages. The same code runs in Node (node.mjs) and in a page (page.mjs).
//
// A message is a header (an object) and a payload (bytes); so is the answer. Python's side is latency_lut/web/worker.py.

const ARRAYS = { float32: Float32Array, uint8: Uint8Array, int8: Int8Array, int32: Int32Array, int64: BigInt64Array };
const LEAST_READINGS = 3;
// A browser's clock is coarse: a reading spans at least this many of its steps.
const LEAST_STEPS = 100;
// JavaScript engines optimize the code around the kernels after some hundred runs, once for all models.
const WARM_MS = 500;

/**
 * What answers messages.
 *
 * @param ort the module onnxruntime-web.
 * @param threads threads of one run.
 * @param printed the array into which the host puts the lines that the runtime prints.
 * @returns a function from (header, payload) to a promise of [header, payload].
 */
export function createSessions(ort, threads, printed) {
  ort.env.wasm.numThreads = threads;
  const sessions = new Map();
  const stepMs = clockStepMs();
  let last = 0;
  let warm = false;

  async function open(model, options = {}) {
    // Severity 3: errors only. The model is copied, since onnxruntime-web may keep it.
    return await ort.InferenceSession.create(model.slice(), { executionProviders: ["wasm"], logSeverityLevel: 3, ...options });
  }

  const operations = {
    hello: async () => [{ version: ort.env.versions.web, clock_step_us: stepMs * 1e3, sessions: sessions.size }],

    load: async (header, payload) => {
      const session = await open(payload);
      last += 1;
      sessions.set(last, { session, feeds: null, fastestMs: Infinity });
      return [{ session: last }];
    },

    run: async (header, payload) => {
      const { session } = found(header.session);
      const feeds = {};
      let offset = 0;
      for (const { name, type, shape } of header.feeds) {
        const bytes = ARRAYS[type].BYTES_PER_ELEMENT * elements(shape);
        const data = payload.slice(offset, offset + bytes); // a copy of its own is aligned
        feeds[name] = new ort.Tensor(type, new ARRAYS[type](data.buffer), shape);
        offset += bytes;
      }
      const name = session.outputNames[0];
      const output = (await session.run(feeds, [name]))[name];
      const { buffer, byteOffset, byteLength } = output.data;
      return [{ type: output.type, shape: output.dims }, new Uint8Array(buffer, byteOffset, byteLength)];
    },

    visit: async (header) => [{ us: await visit(found(header.session), header.seconds * 1e3) }],

    operators: async (header, payload) => {
      const session = await open(payload, { enableProfiling: true });
      try {
        await session.run(randomFeeds(session));
        printed.length = 0;
        await session.endProfiling(); // prints the profile
        const events = JSON.parse(printed.join("\n"));
        return [{ operators: events.filter((event) => event.cat === "Node").map((event) => event.args.op_name) }];
      } finally {
        printed.length = 0;
        await session.release();
      }
    },
  };

  function found(id) {
    const entry = sessions.get(id);
    if (entry === undefined) throw new Error(`no session ${id}`);
    return entry;
  }

  /** Median microseconds of one run, from readings during about `visitMs` after a run that warms up. */
  async function visit(entry, visitMs) {
    entry.feeds ??= randomFeeds(entry.session);
    const { session, feeds } = entry;
    const outputs = [session.outputNames[0]];
    for (const end = performance.now() + WARM_MS; !warm && performance.now() < end; ) await session.run(feeds, outputs);
    warm = true;
    const warmup = performance.now();
    await session.run(feeds, outputs);
    entry.fastestMs = Math.max(stepMs, Math.min(entry.fastestMs, performance.now() - warmup));
    const runs = Math.ceil((LEAST_STEPS * stepMs) / entry.fastestMs);
    const durationsMs = [];
    const end = performance.now() + visitMs;
    for (;;) {
      const begin = performance.now();
      for (let run = 0; run < runs; run += 1) await session.run(feeds, outputs);
      const now = performance.now();
      durationsMs.push((now - begin) / runs);
      if (now > end && durationsMs.length >= LEAST_READINGS) break;
    }
    durationsMs.sort((a, b) => a - b);
    entry.fastestMs = Math.max(stepMs / runs, Math.min(entry.fastestMs, durationsMs[0]));
    const half = durationsMs.length >> 1;
    const medianMs = durationsMs.length % 2 ? durationsMs[half] : (durationsMs[half - 1] + durationsMs[half]) / 2;
    return medianMs * 1e3;
  }

  /** Random inputs: floats of mean 0 and variance 1, integers from 0 to 126. */
  function randomFeeds(session) {
    const feeds = {};
    for (const { name, type, shape } of session.inputMetadata) {
      if (!(type in ARRAYS) || !shape.every((size) => Number.isInteger(size) && size > 0)) {
        throw new Error(`input ${name} is ${type}[${shape}]; allowed are ${Object.keys(ARRAYS)} of fixed shapes`);
      }
      const draw = { float32: () => (Math.random() - 0.5) * Math.sqrt(12), int64: () => BigInt(Math.trunc(Math.random() * 127)) };
      const one = draw[type] ?? (() => Math.trunc(Math.random() * 127));
      feeds[name] = new ort.Tensor(type, ARRAYS[type].from({ length: elements(shape) }, one), shape);
    }
    return feeds;
  }

  return async (header, payload) => {
    try {
      for (const id of header.release ?? []) {
        const entry = sessions.get(id);
        sessions.delete(id);
        await entry?.session.release();
      }
      const [answer, data] = await operations[header.operation](header, payload);
      return [answer, data ?? new Uint8Array()];
    } catch (error) {
      // After an abort inside WebAssembly nothing in this module can be trusted any more.
      const broken = error instanceof WebAssembly.RuntimeError || error instanceof RangeError;
      return [{ error: String(error?.message ?? error), broken }, new Uint8Array()];
    }
  };
}

/** A message as bytes: lengths of header and payload (uint32, little-endian), the header as JSON, the payload. */
export function encode(header, payload) {
  const text = new TextEncoder().encode(JSON.stringify(header));
  const frame = new Uint8Array(8 + text.length + payload.length);
  const view = new DataView(frame.buffer);
  view.setUint32(0, text.length, true);
  view.setUint32(4, payload.length, true);
  frame.set(text, 8);
  frame.set(payload, 8 + text.length);
  return frame;
}

/** Bytes of the whole message that begins with these, or 0 when that cannot be said yet. */
export function frameLength(bytes) {
  if (bytes.length < 8) return 0;
  const view = new DataView(bytes.buffer, bytes.byteOffset, 8);
  return 8 + view.getUint32(0, true) + view.getUint32(4, true);
}

/** The inverse of `encode`. */
export function decode(frame) {
  const length = new DataView(frame.buffer, frame.byteOffset, 8).getUint32(0, true);
  return [JSON.parse(new TextDecoder().decode(frame.subarray(8, 8 + length))), frame.subarray(8 + length)];
}

function elements(shape) {
  return shape.reduce((product, size) => product * size, 1);
}

/** The smallest step that the clock makes. */
function clockStepMs() {
  let step = Infinity;
  for (let times = 0; times < 20; times += 1) {
    const begin = performance.now();
    let now = begin;
    while (now === begin) now = performance.now();
    step = Math.min(step, now - begin);
  }
  return step;
}
