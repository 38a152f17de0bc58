"""How well chat models expect two kinds of answers: those of a data set, and the original's own.

Self-calibration is to bring the original's behaviour back, and a data set's answers do not show that. So the
original answers the held-out questions greedily, as it does in stage 7, and every model is scored on both
kinds in bits. All are compared with the original on the same answers.

    python -m benchmarks.own_answers data/results/gemma_own_answers.csv original=FOLDER calibrated=FOLDER \
        --chats ru=ru_chat_heldout.jsonl --chats en=en_chat_heldout.jsonl
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from benchmarks.real import compared, named_paths
from benchmarks.text_curve import write_record
from ruadapt.evaluation.models import load
from ruadapt.evaluation.perplexity import answer_bits
from ruadapt.files import atomic_write, project_root, read_json, read_jsonl, write_jsonl
from ruadapt.pipeline.adaptation import answer
from ruadapt.reporting import provenance


def main(
    results: Annotated[Path, typer.Argument(help="The table to write.")],
    models: Annotated[list[str], typer.Argument(metavar="NAME=FOLDER...", help="The original first.")],
    chats: Annotated[list[str], typer.Option(metavar="LANGUAGE=PATH", help="Held-out chats.")],
    tokens: Annotated[int, typer.Option(help="Longest answer; longer ones are left out.")] = 128,
    work: Annotated[Path, typer.Option(help="Where the original's answers are kept.")] = Path("runs/own"),
) -> None:
    """Measure the models and write one table."""
    folders, about = named_paths(models), dict[str, Any]()
    given, first = dict[tuple[str, str], list[Any]](), dict[tuple[str, str], np.ndarray]()
    for language, path in named_paths(chats).items():
        given["data set", language] = list(read_jsonl(path))
        prompts, place = work / f"{language}.jsonl", work / language
        write_jsonl(prompts, ({"messages": row["messages"][:-1]} for row in given["data set", language]))
        about[language] = answer(next(iter(folders.values())), prompts, place, tokens)
        given["the original's own", language] = list(read_jsonl(place / "rows.jsonl"))
    table, steps = [], {}
    for name, folder in folders.items():
        model, tokenizer = load(folder)
        for (whose, language), rows in given.items():
            bits, characters = answer_bits(model, tokenizer, rows)
            found = compared(bits, characters, first.get((whose, language)), relative=True)
            first.setdefault((whose, language), bits)
            table.append({"model": name, "answers": whose, "language": language, "rows": len(rows)} | found)
        steps[name] = read_json(folder / "training.json", {}).get("steps")
    atomic_write(results, pd.DataFrame(table).to_csv(index=False, float_format="%.9g"))
    about = {"answers of the original": about, "longest answer": tokens, "steps of the last training": steps}
    write_record(results, {}, about | {"git": provenance.git_state(project_root())})


if __name__ == "__main__":
    typer.run(main)
