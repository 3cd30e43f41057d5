"""Make the held-out text and prompts: `python tests/testbed/heldout.py` (writes tests/testbed/heldout/).

They are the built-in evaluation set (evaluation_sets/), formatted with the testbed's chat template: dialogues and
source files written for this project, on many topics, none of them in the training text. Repeated sentence templates
would make agreement unreliable: a single choice of the model, right or wrong, would count many times.
"""

from __future__ import annotations

import json
from typing import Any

from corpus import HERE, render

PROMPTS = {"prompts.jsonl": 12, "prompts-40.jsonl": 40}  # in each domain, as far as there are
DATA = HERE.parent.parent / "evaluation_sets" / "data"
DOMAINS = ("chat", "code", "reasoning", "tool-calling")


def documents(domain: str) -> list[dict[str, Any]]:
    lines = (DATA / f"{domain.replace('-', '_')}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def text(domain: str) -> str:
    return "".join(f"{one['text'].strip()}\n\n" if "text" in one else render(one) for one in documents(domain))


def beginning(document: dict[str, Any]) -> str:
    """A conversation up to its first answer, or the first half of a source file."""
    if "text" in document:
        lines = document["text"].splitlines(keepends=True)
        return "".join(lines[: min(40, len(lines) // 2)])
    messages = document["messages"]
    first = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
    return render({**document, "messages": messages[:first]}, add_generation_prompt=True)


def main() -> None:
    folder = HERE / "heldout"
    folder.mkdir(exist_ok=True)
    for domain in DOMAINS:
        (folder / f"{domain}.txt").write_text(text(domain), encoding="utf-8")
    for name, count in PROMPTS.items():
        with (folder / name).open("w", encoding="utf-8") as file:
            for domain in DOMAINS:
                for one in documents(domain)[:count]:
                    file.write(json.dumps({"domain": domain, "prompt": beginning(one)}, ensure_ascii=False) + "\n")
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:8d} {path.name}")


if __name__ == "__main__":
    main()
