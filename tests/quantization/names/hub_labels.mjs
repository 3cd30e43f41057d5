// Reads a JSON list of file names from stdin and answers each name's quantization as the hub's own parser sees it, and its pattern.
//
//     npm install @huggingface/gguf     (0.4.6 gave hub_labels.json)
//     node hub_labels.mjs < names.json
import { GGUF_QUANT_RE, parseGGUFQuantLabel } from "@huggingface/gguf";

let text = "";
for await (const part of process.stdin) text += part;
const labels = Object.fromEntries(JSON.parse(text).map((name) => [name, parseGGUFQuantLabel(name) ?? null]));
process.stdout.write(JSON.stringify({ pattern: GGUF_QUANT_RE.source, labels }, null, 1) + "\n");
