"""Make the held-out text and prompts: `python tests/testbed/heldout.py` (writes tests/testbed/heldout/).

Dialogues come from families and seeds that training never draws from (dialogues.HELD_OUT); code is this project's own source, as it
was when this was last run. Neither is in the training text, which is the interpreter's library and dialogues of other families.
"""

from __future__ import annotations

import json

from corpus import HERE, held_out_dialogues, render

SEED = 4711
BYTES = 105_000  # of text in each domain: 60,000 scored positions in all, at 512 tokens a chunk
PROMPTS = {"prompts.jsonl": 12, "prompts-40.jsonl": 40}  # in each domain
ROOT = HERE.parent.parent


def code() -> list[str]:
    """This project's source files, the longest first within a folder, so that the text is not all headers."""
    files = sorted((ROOT / "apex_build").rglob("*.py"), key=lambda path: (path.parent.name, -path.stat().st_size))
    return [path.read_text(encoding="utf-8") for path in files if path.stat().st_size > 3000]


def until_answer(dialogue: dict) -> str:
    """The conversation up to its first answer."""
    asked = [message for message in dialogue["messages"] if message["role"] in ("system", "user")]
    first = asked[: 2 if asked[0]["role"] == "system" else 1]
    return render({**dialogue, "messages": first}, add_generation_prompt=True)


def cut(texts: list[str]) -> str:
    out = ""
    for text in texts:
        out += text
        if len(out.encode()) >= BYTES:
            break
    return out


def prompts(count: int) -> list[dict[str, str]]:
    """Beginnings: a dialogue up to its first answer, a source file up to its middle or line 40."""
    found = [
        {"domain": domain, "prompt": until_answer(dialogue)}
        for domain, dialogues in held_out_dialogues(SEED + 1, count).items()
        for dialogue in dialogues
    ]
    for source in code()[:count]:
        lines = source.splitlines(keepends=True)
        found.append({"domain": "code", "prompt": "".join(lines[: min(40, len(lines) // 2)])})
    return found


def main() -> None:
    folder = HERE / "heldout"
    folder.mkdir(exist_ok=True)
    for domain, dialogues in held_out_dialogues(SEED, 900).items():
        (folder / f"{domain}.txt").write_text(cut([render(dialogue) for dialogue in dialogues]), encoding="utf-8")
    (folder / "code.txt").write_text(cut([f"{source}\n\n" for source in code()]), encoding="utf-8")
    for name, count in PROMPTS.items():
        with (folder / name).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts(count))
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:8d} {path.name}")


if __name__ == "__main__":
    main()
