"""Response candidates for image-question pairs (step 2 of the method, reasoning).

reads   records: `id`, `image`, the question as first human turn
writes  candidates.jsonl: the records with `candidates`; with --augment the images are corrupted first
"""

from llava.errors import run_command
from llava.generate import flags
from llava.prompts import REASONING_STYLES


def main() -> None:
    parser = flags.parser("llava.generate.reason", __doc__, REASONING_STYLES, "cot-default")
    parser.add_argument("--augment", default="", help="corruptions to draw from, comma-separated; see corruption.py")
    arguments = parser.parse_args()
    corruptions: tuple[str, ...] = ()
    if arguments.augment:
        from llava.generate.corruption import check_corruptions

        corruptions = check_corruptions(arguments.augment)
    flags.run(arguments, "generate responses", "reasoning", REASONING_STYLES, corruptions)


if __name__ == "__main__":
    run_command(main)
