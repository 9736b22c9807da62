"""Runs lm-evaluation-harness on a model folder with a task of local files: python lm_eval_run.py MODEL TASKS OUT.

A process of its own: the harness takes seconds to import, warns, and configures logging for all.
"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager


def main(model: str, tasks: str, out: str) -> None:
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32"},
        device="cpu",
        batch_size=2,
        tasks=["tea", "tea_choice", "tea_rolling"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    answer = {
        "results": found["results"],
        "samples": {
            name: [
                {"doc": one["doc"], "arguments": one["arguments"], "resps": one["filtered_resps"]} for one in samples
            ]
            for name, samples in found["samples"].items()
        },
    }
    Path(out).write_text(json.dumps(answer, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
