"""The command line that recaption and reason share. Standard library only, so `--help` answers at once."""

import argparse
import json
from pathlib import Path

from llava.errors import UserError


def parser(module: str, description: str, styles: tuple[str, ...], default_style: str) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model_name_or_path", help="checkpoint folder")
    flags.add_argument("--endpoint", help="URL of a chat-completions server (.../v1), instead of a checkpoint folder")
    flags.add_argument("--model", help="the server's name for its model")
    flags.add_argument("--data_path", required=True, help="records (.json, .jsonl) with image and first human turn")
    flags.add_argument("--image_folder", help="root of the image paths; default: the record file's folder")
    flags.add_argument("--output_dir", required=True, help="run folder to write")
    flags.add_argument(
        "--prompt", default=default_style, help=f"comma-separated, of {', '.join(styles)} (default: {default_style})"
    )
    flags.add_argument(
        "--prompt_file", help='own prompts as JSON: {"name": "text, {question} stands for the question"}'
    )
    flags.add_argument(
        "--n_candidates", default="1", help="candidates per record, one number or one a prompt (default: 1)"
    )
    flags.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    flags.add_argument("--top_p", type=float, default=0.9, help="nucleus mass (default: 0.9)")
    flags.add_argument("--top_k", type=int, default=0, help="0 is off (default)")
    flags.add_argument("--num_beams", type=int, default=1, help="beam search above 1 (default: 1)")
    flags.add_argument("--max_new_tokens", type=int, default=1200, help="(default: 1200)")
    flags.add_argument("--batch_size", type=int, default=8, help="records in flight; does not change the text")
    flags.add_argument("--requests_per_minute", type=float, help="never ask the server more often (default: no limit)")
    flags.add_argument("--adaptive", type=float, help="stop drawing for a record once its candidates agree this well")
    flags.add_argument(
        "--round", type=int, default=1, help="of self-improvement; recorded, changes the seeds (default: 1)"
    )
    flags.add_argument("--seed", type=int, default=0, help="with id, prompt and sample number it fixes the text")
    flags.add_argument("--dry_run", action="store_true", help="check everything, write nothing")
    return flags


def run(flags: argparse.Namespace, stage: str, kind: str, styles: tuple[str, ...], corruptions: tuple[str, ...] = ()):
    """Check the flags, then the preflight or the job."""
    templates = read_templates(flags.prompt_file) if flags.prompt_file else {}
    if bool(flags.endpoint) == bool(flags.model_name_or_path):
        raise UserError(
            "give either a checkpoint (MODEL_PATH, --model_name_or_path) or a server (--endpoint and --model)"
        )
    if flags.endpoint and not flags.model:
        raise UserError("--endpoint needs --model: the name under which the server knows its model")
    if flags.adaptive is not None and not 0 < flags.adaptive <= 1:
        raise UserError(f"--adaptive is {flags.adaptive}; it is a mean cosine, above 0 and up to 1")
    if flags.adaptive is not None and flags.num_beams > 1:
        raise UserError("--adaptive draws one candidate after the other, beams come together. Fix: BEAMS=1")
    wanted = wanted_candidates(flags.prompt, flags.n_candidates, (*styles, *templates))
    from llava.generate.candidates import Sampling
    from llava.generate.job import Job, preflight, run_job

    job = Job(
        model=flags.model if flags.endpoint else flags.model_name_or_path,
        data_path=flags.data_path,
        output_dir=flags.output_dir,
        styles=wanted,
        sampling=Sampling(flags.temperature, flags.top_p, flags.top_k, flags.num_beams, flags.max_new_tokens),
        kind=kind,
        templates={style: text for style, text in templates.items() if style in wanted},
        image_folder=flags.image_folder,
        seed=flags.seed,
        batch_size=flags.batch_size,
        corruptions=corruptions,
        round=flags.round,
        adaptive=flags.adaptive,
        endpoint=flags.endpoint,
        requests_per_minute=flags.requests_per_minute,
    )
    if flags.dry_run:
        preflight(job)
    else:
        run_job(job, stage)


def wanted_candidates(prompt: str, n_candidates: str, styles: tuple[str, ...]) -> dict[str, int]:
    """PROMPT and N_CANDIDATES as style -> number: `cod-default,default` and `2,1`, or one number for all.

    >>> wanted_candidates("cod-default,default", "2,1", ("cod-default", "default"))
    {'cod-default': 2, 'default': 1}
    """
    names, numbers = prompt.split(","), n_candidates.split(",")
    for name in names:
        if name not in styles:
            raise UserError(f"PROMPT is {name!r}; choose one of {', '.join(styles)}")
    if len(set(names)) < len(names):
        raise UserError(f"PROMPT {prompt} names a prompt twice. Fix: raise its N_CANDIDATES")
    if len(numbers) == 1:
        numbers *= len(names)
    if len(numbers) != len(names) or not all(number.strip().isdigit() and int(number) > 0 for number in numbers):
        raise UserError(f"N_CANDIDATES is {n_candidates!r}; give one number above 0, or one for each of {prompt}")
    return dict(zip(names, map(int, numbers), strict=True))


def read_templates(path: str) -> dict[str, str]:
    """The user's own prompts. Raises UserError when the file is no JSON object of texts."""
    try:
        templates = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(templates, dict) or not all(
        isinstance(text, str) and text.strip() for text in templates.values()
    ):
        raise UserError(f'{path} should be {{"name": "instruction", ...}}, with texts that are not empty')
    return templates
