"""The ceiling: the engine alone, called again and again with a batch that lies ready.

    python bare.py ARTIFACT SIDE THREADS MAX_ROWS IMAGES.npy ANSWERS.npy

Writes the answers to the images, then reads lines `ROWS SECONDS` and prints for each a line of JSON: images a second and the median of a
call. In between it sleeps, so it can stay beside a server and be asked before and after it.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import numpy as np

from serving_peers.engine import Engine


def main(artifact: str, side: str, threads: str, max_rows: str, images: str, answers: str) -> None:
    engine = Engine(artifact, side=int(side), threads=int(threads), max_rows=int(max_rows))
    images_BHWC = np.load(images, allow_pickle=False)
    np.save(answers, np.concatenate([engine(image[None]) for image in images_BHWC]), allow_pickle=False)
    print("ready", flush=True)
    for line in sys.stdin:
        rows, seconds = line.split()
        batches = [np.ascontiguousarray(np.resize(np.roll(images_BHWC, n, axis=0), (int(rows), *engine.shape))) for n in range(4)]
        times: list[float] = []
        started = time.perf_counter()
        while (now := time.perf_counter()) < started + float(seconds):
            engine(batches[len(times) % 4])
            times.append(time.perf_counter() - now)
        rate = len(times) * int(rows) / (time.perf_counter() - started)
        print(json.dumps({"rows": int(rows), "images_per_s": rate, "call_ms": median(times) * 1e3}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
