"""Reads rendered words back: the recogniser of the OCR reward, as two functions."""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np
from PIL import Image


@lru_cache
def _session():
    import onnxruntime as ort
    import rapidocr

    o = ort.SessionOptions()
    o.intra_op_num_threads = 2
    s = ort.InferenceSession(os.path.dirname(rapidocr.__file__) + "/models/PP-OCRv6_rec_small.onnx", o, providers=["CPUExecutionProvider"])
    return s, [""] + s.get_modelmeta().custom_metadata_map["character"].splitlines() + [" "]


def read_words(pictures: np.ndarray) -> list[str]:
    s, chars = _session()
    texts = []
    for i in range(0, len(pictures), 8):
        x = np.stack([np.asarray(Image.fromarray(p).resize((144, 48), Image.BICUBIC), dtype=np.float32) / 127.5 - 1 for p in pictures[i : i + 8]])
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2)[:, ::-1])
        for row in s.run(None, {"x": x})[0].argmax(-1):
            texts.append("".join(chars[a] for k, a in enumerate(row) if a != 0 and (k == 0 or a != row[k - 1])))
    return texts


def _distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        prev, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            prev, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, prev + (x != y))
    return row[-1]


def spelling_score(texts: list[str], words: list[str]) -> float:
    return float(np.mean([1 - min(_distance(t.replace(" ", "").lower(), w.lower()), len(w)) / len(w) for t, w in zip(texts, words)]))
