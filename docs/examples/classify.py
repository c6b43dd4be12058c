"""Classify texts with an exported model: python classify.py model.onnx "a wonderful film"

It requires numpy, onnxruntime and the file model.json next to model.onnx.
"""

import html
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime

file, *texts = sys.argv[1:]
metadata = json.loads(Path(file).with_suffix(".json").read_text(encoding="utf-8"))
tokenizer = metadata["tokenizer"]
max_length = metadata["max_length"] or 0  # 0: no limit, because words[-0:] are all words
token_ids = {word: number for number, word in enumerate(metadata["vocabulary"])}
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

for text in texts or sys.stdin.read().splitlines():
    plain = re.sub(tokenizer["tag"], " ", text)
    # Python does not convert numbers of thousands of digits. Eight digits give the same result,
    # because they are no character either.
    plain = re.sub("&#([0-9]{9,})", lambda match: f"&#{match[1].lstrip('0')[:8] or 0}", plain)
    plain = html.unescape(plain)
    plain = plain.lower().replace(tokenizer["apostrophe"], "'")
    words = re.findall(tokenizer["word"], plain)
    known = [token_ids[word] for word in words if word in token_ids][-max_length:]
    tokens = np.array([known or [0]], np.int32)
    lengths = np.array([len(known)], np.int32)
    (logits,) = session.run(["logits"], {"tokens": tokens, "lengths": lengths})[0]
    exponentials = np.exp(logits - logits.max())
    best = exponentials.argmax()
    print(f"{metadata['classes'][best]}\t{exponentials[best] / exponentials.sum():.4f}\t{text}")
