import subprocess
import sys
import time

import pytest

from llava.errors import UserError
from llava.train.arguments import derive_accumulation


def test_global_batch_derives_the_accumulation(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "32")
    assert derive_accumulation(128, 4, 1, given=False) == 1
    assert derive_accumulation(256, 4, 1, given=False) == 2
    assert derive_accumulation(None, 4, 7, given=True) == 7


def test_contradictions_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "32")
    with pytest.raises(UserError, match="ACCU_STEPS 1"):
        derive_accumulation(128, 4, 2, given=True)
    with pytest.raises(UserError, match="not a multiple"):
        derive_accumulation(100, 4, 1, given=False)


MODULES = [
    "llava.train.sft", "llava.generate.recaption", "llava.generate.reason", "llava.eval.benchmarks", "llava.eval.report",
    "llava.eval.captions", "llava.eval.sweep", "llava.train.dpo", "llava.eval.vlmevalkit", "llava.eval.lmms_model",
    "llava.model.assemble", "llava.records", "quality_evaluation.curate", "quality_evaluation.report",
    "training_data_annotation.annotate_captions", "training_data_annotation.convert_reasoning",
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_help_answers_at_once_with_our_flags_and_loads_nothing_heavy(module):
    program = (
        f"import runpy, sys; sys.argv = ['{module}', '--help']\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    start = time.time()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert time.time() - start < 5  # a second on a quiet machine
    assert "--" in result.stdout
    heavy = result.stderr.strip().splitlines()[-1]
    assert heavy == "[]" or (module == "quality_evaluation.report" and heavy == "['numpy']")
