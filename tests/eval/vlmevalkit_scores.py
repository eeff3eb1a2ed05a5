"""VLMEvalKit's own numbers for prediction files. Run by an interpreter that can import `vlmeval`:

    LMUData=FOLDER_OF_TSVS python vlmevalkit_scores.py NAME=PREDICTIONS.xlsx ...

Prints JSON: benchmark -> its results by name.
"""

import contextlib
import json
import sys

from vlmeval.dataset import build_dataset
from vlmeval.dataset.image_base import ImageBaseDataset


def local_only(cls: type) -> None:
    cls.DATASET_MD5 = {}
    for child in cls.__subclasses__():
        local_only(child)


local_only(ImageBaseDataset)
scores = {}
for argument in sys.argv[1:]:
    name, _, path = argument.partition("=")
    with contextlib.redirect_stdout(sys.stderr):
        found = build_dataset(name).evaluate(path, model="exact_matching")
    if not isinstance(found, dict):
        row = found.iloc[0]
        found = {str(key): row[key] for key in found.columns}
    scores[name] = {key: float(value) for key, value in found.items() if not isinstance(value, str)}
print(json.dumps(scores))
