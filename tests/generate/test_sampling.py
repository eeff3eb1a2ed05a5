import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from llava.errors import UserError
from llava.generate.candidates import Draw, Prompt, Sampling
from llava.generate.choose import choose
from llava.generate.sampling import complete
from llava.seeds import seed_of


def noise(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def prompts():
    sizes = [(48, 48), (100, 84), (150, 50), (72, 48), (48, 72)]
    return [
        Prompt([noise(*size, index)], [f"<image>\nWhat color is {'it ' * index}?"], [Draw(0, seed_of(7, index, sample)) for sample in range(3)])
        for index, size in enumerate(sizes)
    ]  # fmt: skip


def test_greedy_equals_hugging_face_generate(model, processor, prompts):
    [[ours]] = complete(
        model,
        processor,
        [Prompt(prompts[1].images, prompts[1].messages, [Draw(0, 0)])],
        Sampling(temperature=0, max_new_tokens=12),
    )
    inputs = processor(
        images=prompts[1].images, text=[processor.prompt([{"role": "user", "content": prompts[1].messages[0]}])]
    )
    end = processor.tokenizer.eos_token_id
    ids = model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=end,
        suppress_tokens=list(range(processor.image_token_id, 1024)),
    )
    ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert ours.text == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert ours.tokens == len(ids)


def test_text_depends_on_the_seed_and_not_on_the_batch(model, processor, prompts):
    sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=10)
    together = complete(model, processor, prompts, sampling)
    alone = [complete(model, processor, [prompt], sampling)[0] for prompt in prompts]
    backwards = complete(model, processor, prompts[::-1], sampling)[::-1]
    assert together == alone == backwards
    assert len({candidate.text for candidate in together[1]}) > 1
    again = complete(model, processor, prompts, sampling)
    assert again == together


def test_choose_follows_the_distribution_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).repeat(5, 1))
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.81, 0.96])
    plain = Sampling(temperature=1, top_p=1.0)
    assert choose(logits, uniform, plain).tolist() == [0, 0, 1, 2, 3]
    # top-p 0.7 keeps 0.5 and 0.3: the boundary between them lies at 0.5 / 0.8 = 0.625
    assert choose(logits, uniform, Sampling(temperature=1, top_p=0.7)).tolist() == [0, 0, 0, 1, 1]
    assert choose(logits, uniform, Sampling(temperature=1, top_p=1.0, top_k=1)).tolist() == [0] * 5
    assert choose(logits, uniform, Sampling(temperature=0)).tolist() == [0] * 5
    # temperature 0.5 squares the odds: 0.25, 0.09, 0.0225, 0.0025 of 0.365
    assert choose(
        logits, torch.tensor([0.68, 0.69, 0.92, 0.94, 0.999]), Sampling(temperature=0.5, top_p=1.0)
    ).tolist() == [0, 1, 1, 2, 3]


def test_finish_reason_and_length(model, processor, prompts):
    for candidates in complete(model, processor, prompts, Sampling(temperature=1.5, top_p=1.0, max_new_tokens=6)):
        for candidate in candidates:
            assert (candidate.finish_reason == "length") <= (candidate.tokens == 6)
            assert candidate.tokens <= 6
            assert "<image>" not in candidate.text


def test_beams(model, processor, prompts):
    sampling = Sampling(temperature=0, num_beams=3, max_new_tokens=6)
    first = complete(model, processor, prompts[:2], sampling)
    assert [len(candidates) for candidates in first] == [3, 3]
    assert first == complete(model, processor, prompts[:2], sampling)
    with pytest.raises(UserError, match="BEAMS >= N_CANDIDATES"):
        complete(model, processor, prompts[:2], Sampling(temperature=0, num_beams=2, max_new_tokens=6))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"num_beams": 0}, {"max_new_tokens": 0}]
)
def test_settings_that_make_no_sense_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_the_checkpoints_own_generation_settings_are_not_inherited(model, processor, prompts):
    sampling = Sampling(temperature=0.8, max_new_tokens=8)
    before = complete(model, processor, prompts[:2], sampling)
    model.generation_config.update(top_k=1, repetition_penalty=5.0, temperature=9.0, do_sample=True)
    assert complete(model, processor, prompts[:2], sampling) == before
    beams = Sampling(temperature=0, num_beams=3, max_new_tokens=8)
    changed = complete(model, processor, prompts[:2], beams)
    model.generation_config = GenerationConfig()
    assert complete(model, processor, prompts[:2], beams) == changed


def test_beams_see_their_own_images(model, processor, prompts):
    texts = [processor.prompt([{"role": "user", "content": prompt.messages[0]}]) for prompt in prompts]
    inputs = processor(images=[prompt.images for prompt in prompts], text=texts)
    images = {key: inputs[key] for key in ("pixel_values", "slice_shapes", "grids")}
    with torch.no_grad():
        alone = [model.model.encode_images(**processor.image_processor(prompt.images)) for prompt in prompts]
        repeated = model.repeat_images(inputs["input_ids"], 3, **images)
        expected = torch.cat([features for features in alone for _ in range(3)])
        torch.testing.assert_close(model.model.encode_images(**repeated), expected, atol=1e-5, rtol=1e-5)


def test_one_beam_of_many_is_greedy_when_the_others_cannot_win(model, processor, prompts):
    greedy = complete(
        model,
        processor,
        [Prompt(prompts[1].images, prompts[1].messages, [Draw(0, 0)])],
        Sampling(temperature=0, max_new_tokens=1),
    )
    beams = complete(
        model,
        processor,
        [Prompt(prompts[1].images, prompts[1].messages, [Draw(0, 0)])],
        Sampling(temperature=0, num_beams=3, max_new_tokens=1),
    )
    assert beams == greedy  # the best single token is the best beam of length one


def test_training_works_after_generating_in_the_same_process(model, processor, prompts):
    from llava.model.resampler import roi_matrix
    from llava.train.parts import set_trainable

    roi_matrix.cache_clear()
    set_trainable(model, ["projector"])
    complete(model, processor, prompts[:2], Sampling(temperature=0, max_new_tokens=2))
    model.train()
    inputs = processor(
        images=prompts[1].images, text=[processor.prompt([{"role": "user", "content": prompts[1].messages[0]}])]
    )
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.projector.query.grad.abs().sum() > 0


def test_styles_that_share_a_prefix_say_what_they_say_alone(model, processor, prompts):
    """Two messages about one image in one prompt, more draws than rows, refilled: the text of separate prompts."""
    from llava.generate.sampling import stream

    sampling = Sampling(temperature=0.9, top_p=0.95, max_new_tokens=9)
    messages = ["<image>\nPlease describe it.", "<image>\nPlease describe it in detail, step by step."]
    seeds = [[seed_of(style, sample) for sample in range(3)] for style in messages]
    together = [
        Prompt(prompt.images, messages, [Draw(n, seed) for n in (0, 1) for seed in seeds[n]]) for prompt in prompts
    ]
    finished = dict(stream(model, processor, enumerate(together), sampling, rows=4))
    assert set(finished) == set(range(len(prompts)))
    for number, prompt in enumerate(prompts):
        alone = [
            completion
            for n in (0, 1)
            for completion in complete(
                model, processor, [Prompt(prompt.images, [messages[n]], [Draw(0, seed) for seed in seeds[n]])], sampling
            )[0]
        ]
        assert [completion for _, completion in finished[number]] == alone
        assert [draw.seed for draw, _ in finished[number]] == seeds[0] + seeds[1]


def test_further_draws_continue_from_the_same_image(model, processor, prompts):
    from llava.generate.sampling import stream

    sampling = Sampling(temperature=0.9, max_new_tokens=6)
    draws = prompts[1].draws
    first = Prompt(prompts[1].images, prompts[1].messages, draws[:1])

    def more(key, finished):
        assert key == "it"
        return draws[len(finished) : len(finished) + 1]

    [(_, grown)] = stream(model, processor, [("it", first)], sampling, rows=2, more=more)
    assert [completion for _, completion in grown] == complete(model, processor, [prompts[1]], sampling)[0]


def test_a_large_vocabulary_is_not_sorted_and_gives_the_same_tokens(monkeypatch):
    from llava.generate import choose as module

    torch.manual_seed(0)
    logits = torch.randn(64, 5000) * 4
    logits[:, 7] = logits[:, 9] = logits.max()  # a tie at the top
    uniform = torch.rand(64)
    settings = [Sampling(top_p=p, top_k=k, temperature=t) for p in (0.5, 0.9, 1.0) for k in (0, 50) for t in (0.7, 3.0)]
    partly = [choose(logits, uniform, sampling).tolist() for sampling in settings]
    monkeypatch.setattr(module, "LEADING", 5000)
    assert partly == [choose(logits, uniform, sampling).tolist() for sampling in settings]


def test_batch_shapes_seldom_change_a_text(model, processor, prompts):
    """What floating point may do to the promise of equal texts, counted: 40 texts at six numbers of rows."""
    from llava.generate.sampling import stream

    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=24)
    asked = [
        Prompt(p.images, p.messages, [Draw(0, seed_of(number, k)) for k in range(8)])
        for number, p in enumerate(prompts)
    ]
    texts = []
    for rows in (1, 3, 7, 16, 40):
        finished = dict(stream(model, processor, enumerate(asked), sampling, rows))
        texts.append([completion.text for number in range(len(asked)) for _, completion in finished[number]])
    different = sum(one != other for row in texts[1:] for one, other in zip(texts[0], row, strict=True))
    assert different <= 2, f"{different} of {4 * len(texts[0])} texts differ"
