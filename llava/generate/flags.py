"""The command line that recaption and reason share. Standard library only, so `--help` answers at once."""

import argparse


def parser(module: str, description: str, styles: tuple[str, ...], default_style: str) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model_name_or_path", required=True, help="checkpoint folder")
    flags.add_argument("--data_path", required=True, help="records (.json, .jsonl) with image and first human turn")
    flags.add_argument("--image_folder", help="root of the image paths; default: the record file's folder")
    flags.add_argument("--output_dir", required=True, help="run folder to write")
    flags.add_argument("--prompt", default=default_style, help=f"one of {', '.join(styles)} (default: {default_style})")
    flags.add_argument("--n_candidates", type=int, default=1, help="candidates per record (default: 1)")
    flags.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    flags.add_argument("--top_p", type=float, default=0.9, help="nucleus mass (default: 0.9)")
    flags.add_argument("--top_k", type=int, default=0, help="0 is off (default)")
    flags.add_argument("--num_beams", type=int, default=1, help="beam search above 1 (default: 1)")
    flags.add_argument("--max_new_tokens", type=int, default=1200, help="(default: 1200)")
    flags.add_argument("--batch_size", type=int, default=8, help="records per batch; does not change the text")
    flags.add_argument("--seed", type=int, default=0, help="with id, prompt and sample number it fixes the text")
    flags.add_argument("--dry_run", action="store_true", help="check everything, write nothing")
    return flags


def run(flags: argparse.Namespace, stage: str, styles: tuple[str, ...], instruction, corruptions: tuple[str, ...] = ()):
    """Check the flags, then the preflight or the job."""
    from llava.errors import UserError

    if flags.prompt not in styles:
        raise UserError(f"PROMPT is {flags.prompt!r}; choose one of {', '.join(styles)}")
    if flags.n_candidates < 1:
        raise UserError(f"N_CANDIDATES is {flags.n_candidates}; at least 1 is needed")
    from llava.generate.job import Job, preflight, run_job
    from llava.generate.sampling import Sampling

    job = Job(
        model_name_or_path=flags.model_name_or_path,
        data_path=flags.data_path,
        output_dir=flags.output_dir,
        style=flags.prompt,
        n_candidates=flags.n_candidates,
        sampling=Sampling(flags.temperature, flags.top_p, flags.top_k, flags.num_beams, flags.max_new_tokens),
        image_folder=flags.image_folder,
        seed=flags.seed,
        batch_size=flags.batch_size,
        corruptions=corruptions,
    )
    if flags.dry_run:
        preflight(job, instruction)
    else:
        run_job(job, stage, instruction)
