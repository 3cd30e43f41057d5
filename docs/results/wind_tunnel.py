"""The table of wind-tunnel.md, from the folder that wind_tunnel.sh filled: python docs/results/wind_tunnel.py FOLDER"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    print("| file | bytes | bits per weight | KLD | same first choice, % |\n|---|---|---|---|---|")
    for line in (folder / "kld.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        manifest = json.loads((folder / f"{row['file']}.json").read_text(encoding="utf-8"))
        n_bytes = sum(tensor["n_bytes"] for tensor in manifest["tensors"])
        elements = sum(math.prod(tensor["shape"]) for tensor in manifest["tensors"])
        of = {figure["name"]: figure for figure in row["figures"] if not figure["domain"]}
        kld, same = of["kld.mean"], of["top1.agreement"]
        interval = f" [{kld['low']:.4f}, {kld['high']:.4f}]" if kld["low"] is not None else ""  # none for few chunks
        print(
            f"| {row['file'].removesuffix('.gguf')} | {manifest['bytes']:,} | {8 * n_bytes / elements:.2f} | "
            f"{kld['value']:.4f}{interval} | {same['value']:.1f} |"
        )


if __name__ == "__main__":
    main()
