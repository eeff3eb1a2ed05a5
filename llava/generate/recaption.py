"""Caption candidates for images (step 2 of the method, perception).

reads   records: `id`, `image`, and for `cod-conv` the first human turn
writes  candidates.jsonl: the records with `candidates`, each with text, prompt, seed, sampling, model
"""

from llava.errors import run_command
from llava.generate import flags
from llava.prompts import CAPTION_STYLES


def main() -> None:
    arguments = flags.parser("llava.generate.recaption", __doc__, CAPTION_STYLES, "cod-default").parse_args()
    flags.run(arguments, "generate captions", "caption", CAPTION_STYLES)


if __name__ == "__main__":
    run_command(main)
