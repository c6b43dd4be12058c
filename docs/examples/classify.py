"""Classify texts with an exported model: python classify.py model.onnx "a wonderful film"

It needs numpy and onnxruntime, and model.json beside model.onnx.
"""

import html
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime

file, *texts = sys.argv[1:]
about = json.loads(Path(file).with_suffix(".json").read_text(encoding="utf-8"))
tokenizer, longest = about["tokenizer"], about["max_length"] or 0
ids = {word: number for number, word in enumerate(about["vocabulary"])}
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

for text in texts or sys.stdin.read().splitlines():
    plain = re.sub(tokenizer["tag"], " ", text)
    # Python reads no number of thousands of digits; one of eight digits is no character either.
    plain = re.sub("&#([0-9]{9,})", lambda found: f"&#{found[1].lstrip('0')[:8] or 0}", plain)
    plain = html.unescape(plain)
    plain = plain.lower().replace(tokenizer["apostrophe"], "'")
    words = re.findall(tokenizer["word"], plain)
    known = [ids[word] for word in words if word in ids][-longest:]
    tokens = np.array([known or [0]], np.int32)
    lengths = np.array([len(known)], np.int32)
    (logits,) = session.run(["logits"], {"tokens": tokens, "lengths": lengths})[0]
    odds = np.exp(logits - logits.max())
    best = odds.argmax()
    print(f"{about['classes'][best]}\t{odds[best] / odds.sum():.4f}\t{text}")
