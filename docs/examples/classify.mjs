// Classify texts with an exported model: node classify.mjs model.onnx "a wonderful film"
//
// It requires onnxruntime-web or onnxruntime-node, and the file model.json next to model.onnx.

import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web";

const [file, ...texts] = process.argv.slice(2);
const metadata = JSON.parse(readFileSync(file.replace(/(\.[^./]*)?$/, ".json"), "utf8"));
const { tag, reference, characters, apostrophe, word } = metadata.tokenizer;
const tokenIds = new Map(metadata.vocabulary.map((word, number) => [word, number]));
const session = await ort.InferenceSession.create(readFileSync(file));

function decodeReference(all, decimal, hexadecimal, name) {
  if (name === undefined) {
    const code = decimal ? parseInt(decimal) : parseInt(hexadecimal, 16);
    const exists = code < 0xd800 || (code > 0xdfff && code < 0x110000);
    return characters[`#${code}`] ?? (exists ? String.fromCodePoint(code) : "\ufffd");
  }
  let end = name.length; // the longest prefix that is a name: "amp" of "ampere"
  while (end > 1 && !Object.hasOwn(characters, name.slice(0, end))) end--;
  return end > 1 ? characters[name.slice(0, end)] + name.slice(end) : all;
}

for (const text of texts.length ? texts : readFileSync(0, "utf8").trimEnd().split("\n")) {
  const untagged = text.replace(RegExp(tag, "gu"), " ");
  const plain = untagged.replace(RegExp(reference, "gu"), decodeReference).toLowerCase();
  const words = plain.replaceAll(apostrophe, "'").match(RegExp(word, "gu")) ?? [];
  const known = words.filter((word) => tokenIds.has(word)).slice(-(metadata.max_length ?? 0));
  const tokens = known.length ? known.map((word) => tokenIds.get(word)) : [0];
  const { logits } = await session.run({
    tokens: new ort.Tensor("int32", tokens, [1, tokens.length]),
    lengths: new ort.Tensor("int32", [known.length], [1]),
  });
  const exponentials = Array.from(logits.data, Math.exp);
  const best = exponentials.indexOf(Math.max(...exponentials));
  const probability = exponentials[best] / exponentials.reduce((sum, each) => sum + each);
  console.log(`${metadata.classes[best]}\t${probability.toFixed(4)}\t${text}`);
}
