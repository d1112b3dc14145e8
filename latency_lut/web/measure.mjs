// Times the models of a bundle in this page, and offers what every visit took as a file; the lines of that file are those of
// latency_lut/runner.py. Opened with ?start it does not wait for the button.

import { createSessions } from "./sessions.mjs";
import { sha256 } from "./sha256.mjs";

const SCHEMA_VERSION = 1;
const FORMAT = "netwright-bundle";
const UNIT = "us";
const SETTINGS = ["runtime", "provider", "threads", "batch"];
const BROKEN = "after an error in WebAssembly the page has to begin anew";

const element = (id) => document.getElementById(id);
const text = (bytes) => new TextDecoder().decode(bytes);

/** The lines of the results: kept in the browser's storage, where there is room, so that a reload goes on. */
class Lines {
  constructor(key, head) {
    this.key = key;
    this.lines = (localStorage.getItem(key) ?? "").split("\n").slice(0, -1);
    if (this.lines[0] !== JSON.stringify(head)) this.lines = [];
    if (!this.lines.length) this.lines.push(JSON.stringify(head));
    this.done = new Set();
    this.batches = 0;
    this.failed = 0;
    this.complete = false;
    this.lines.map(JSON.parse).forEach((line) => this.know(line));
  }

  know(line) {
    if (line.kind === "visits" || line.kind === "failed") this.done.add(line.id);
    if (line.kind === "visits") this.batches = Math.max(this.batches, line.batch + 1);
    if (line.kind === "failed") this.failed += 1;
    if (line.kind === "end") this.complete = true;
  }

  append(line) {
    this.lines.push(JSON.stringify(line));
    this.know(line);
  }

  content() {
    return this.lines.map((line) => `${line}\n`).join("");
  }

  keep() {
    try {
      localStorage.setItem(this.key, this.content());
    } catch {
      localStorage.removeItem(this.key); // no room: a reload begins anew
    }
  }
}

async function main() {
  if (location.protocol === "file:") throw new Error("open this page from a server: run python serve.py in its folder");
  const content = await bytesOf("manifest.json");
  const manifest = JSON.parse(text(content));
  if (manifest.format !== FORMAT || manifest.schema_version !== SCHEMA_VERSION) throw new Error("manifest.json is of another version");
  if (manifest.device.threads > 1 && !crossOriginIsolated) {
    throw new Error("threads need a page from https or from this machine, with the headers that serve.py sends");
  }
  const ort = await import("./ort.wasm.bundle.min.mjs");
  const answer = createSessions(ort, manifest.device.threads, []);
  const device = await describe(manifest.device, ort);
  const fingerprint = fingerprintOf(device);
  const bundle = sha256(content);
  const head = { kind: "head", schema_version: SCHEMA_VERSION, bundle, unit: UNIT, device, fingerprint };
  const lines = new Lines(`netwright ${bundle}`, head);
  tell(lines, manifest, "Ready.");
  if (lines.complete) return offer(lines);
  if (!new URLSearchParams(location.search).has("start")) {
    element("start").disabled = false;
    await new Promise((resolve) => element("start").addEventListener("click", resolve, { once: true }));
    element("start").disabled = true;
  }
  const lock = await navigator.wakeLock?.request("screen").catch(() => null); // a dark screen slows a phone down
  await measure(manifest, lines, answer);
  await lock?.release();
  const counts = { measured: lines.done.size - lines.failed, failed: lines.failed };
  const sum = sha256(new TextEncoder().encode(lines.content()));
  lines.append({ kind: "end", complete: true, ...counts, fingerprint, sha256: sum });
  lines.keep();
  tell(lines, manifest, "Complete.");
  offer(lines);
}

/** Measure what is missing: pairs, then networks, in batches with the anchors in front. */
async function measure(manifest, lines, answer) {
  const models = new Map(manifest.models.map((model) => [model.id, model]));
  const anchors = new Map();
  for (const id of manifest.anchors) anchors.set(id, await load(models.get(id), answer));
  const draw = random(manifest.seed);
  for (const [kind, { rounds, visit_s, batch }] of Object.entries(manifest.protocol)) {
    const isOther = ({ id }) => !lines.done.has(id) && !anchors.has(id);
    const missing = manifest.models.filter((model) => model.kind === kind && isOther(model));
    const alone = kind === "pair" && models.size === anchors.size && !manifest.anchors.every((id) => lines.done.has(id));
    for (let first = 0; first < missing.length || (alone && !first); first += batch) {
      const sessions = new Map(anchors);
      for (const model of missing.slice(first, first + batch)) {
        try {
          sessions.set(model.id, await load(model, answer));
        } catch (error) {
          if (!(error instanceof ModelError)) throw error;
          lines.append({ kind: "failed", id: model.id, reason: printable(error.message).slice(0, 300) });
          if (error.broken) {
            lines.keep();
            throw new Error(BROKEN);
          }
        }
      }
      await visitAll(sessions, rounds, visit_s, lines, answer, draw);
      const release = [...sessions].filter(([id]) => !anchors.has(id)).map(([, session]) => session);
      await answer({ operation: "hello", release });
      lines.keep();
      tell(lines, manifest, kind === "pair" ? "Layers." : "Networks.");
    }
  }
}

/** Visit models in turn, each once per round, in a new order every round. A round before, which is not counted, warms up. */
async function visitAll(sessions, rounds, visitS, lines, answer, draw) {
  const ids = [...sessions.keys()];
  const visits = new Map(ids.map((id) => [id, { us: [], position: [] }]));
  for (let round = -1; round < rounds; round += 1) {
    const order = shuffled(ids, draw);
    for (const [position, id] of order.entries()) {
      const [{ us, error }] = await answer({ operation: "visit", session: sessions.get(id), seconds: visitS });
      if (error !== undefined) throw new Error(`${id}: ${error}`);
      if (round < 0) continue;
      visits.get(id).us.push(Math.round(us * 1e4) / 1e4);
      visits.get(id).position.push(position);
    }
    await new Promise((resolve) => setTimeout(resolve)); // lets the browser draw
  }
  const batch = lines.batches;
  for (const [id, taken] of visits) lines.append({ kind: "visits", batch, id, ...taken });
}

class ModelError extends Error {}

async function load(model, answer) {
  const content = await bytesOf(`models/${model.id}.onnx`);
  if (sha256(content) !== model.sha256) throw new Error(`models/${model.id}.onnx has another checksum than the manifest says`);
  const [{ session, error, broken }] = await answer({ operation: "load" }, content);
  if (error === undefined) return session;
  throw Object.assign(new ModelError(`${model.id}: ${error}`), { broken });
}

async function bytesOf(path) {
  const response = await fetch(path, { cache: "no-store" });
  if (!response.ok) throw new Error(`cannot load ${path}: ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}

/** What the browser tells about itself, like latency_lut.device.Device.describe. */
async function describe(settings, ort) {
  const hints = ["architecture", "bitness", "model", "platformVersion"];
  const more = (await navigator.userAgentData?.getHighEntropyValues(hints).catch(() => null)) ?? {};
  const cpu = [more.model, more.architecture, more.bitness].filter(Boolean).join(" ") || "not told by the browser";
  const system = [more.platform ?? navigator.platform, more.platformVersion].filter(Boolean).join(" ") || "not told by the browser";
  return {
    cpu: printable(cpu),
    instruction_sets: "",
    cores: navigator.hardwareConcurrency ?? 1,
    os: printable(system),
    ...Object.fromEntries(SETTINGS.map((name) => [name, settings[name]])),
    runtime_version: ort.env.versions.web,
    host: printable(navigator.userAgent),
  };
}

/** latency_lut.machine.fingerprint_of, of texts that are `printable` and integers. */
function fingerprintOf(device) {
  const parts = Object.keys(device).sort().map((name) => `${JSON.stringify(name)}: ${JSON.stringify(device[name])}`);
  return sha256(new TextEncoder().encode(`{${parts.join(", ")}}`)).slice(0, 16);
}

function printable(said) {
  return String(said).replace(/[^ -~]/g, "?");
}

function shuffled(items, draw) {
  const order = [...items];
  for (let last = order.length - 1; last > 0; last -= 1) {
    const other = Math.floor(draw() * (last + 1));
    [order[last], order[other]] = [order[other], order[last]];
  }
  return order;
}

/** Numbers from 0 to 1 by a seed (Mulberry32). */
function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

function tell(lines, manifest, what) {
  const total = manifest.models.length;
  element("bar").max = total;
  element("bar").value = lines.done.size;
  const failed = lines.failed ? `, ${lines.failed} do not load here` : "";
  element("said").textContent = `${what} ${lines.done.size} of ${total} models measured${failed}.`;
}

function offer(lines) {
  const link = element("download");
  link.href = URL.createObjectURL(new Blob([lines.content()], { type: "application/jsonl" }));
  link.hidden = false;
}

main().catch((error) => {
  if (error.message === BROKEN) return location.replace(`${location.pathname}?start`);
  element("problem").textContent = String(error.message ?? error);
  element("said").textContent = "Stopped.";
});
