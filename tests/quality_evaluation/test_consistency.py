"""Agreement scores against arithmetic done by hand."""

import numpy as np
import pytest

from quality_evaluation.consistency import best, leave_one_out, mean_cosine, normal, pick_rejected, unit, vote


def test_mean_cosine_counts_the_candidate_itself_and_ignores_length():
    # cos((3, 4), (4, 3)) = 24 / 25 = 0.96; the second vector is twice the first
    scores = mean_cosine(np.array([[3.0, 4.0], [6.0, 8.0], [4.0, 3.0]]))
    assert scores == pytest.approx([(1 + 1 + 0.96) / 3, (1 + 1 + 0.96) / 3, (0.96 + 0.96 + 1) / 3])


def test_mean_cosine_of_opposites_and_of_one():
    assert mean_cosine(np.array([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx([0, 0])
    assert mean_cosine(np.array([[5.0, 0.0]])) == pytest.approx([1])


def test_leave_one_out_is_the_mean_over_the_others():
    scores = leave_one_out(np.array([[3.0, 4.0], [6.0, 8.0], [4.0, 3.0]]))
    assert scores == pytest.approx([(1 + 0.96) / 2, (1 + 0.96) / 2, 0.96])


@pytest.mark.parametrize(("count", "published", "others"), [(2, 0.9, 0.8), (4, 0.8, 0.7333333), (6, 0.85, 0.82)])
def test_the_published_threshold_means_another_agreement_for_each_number_of_candidates(count, published, others):
    # one candidate has cosine x with each other one, so it scores (1 + (n - 1) x) / n
    angle = np.arccos(others)
    embeddings = np.array([[1.0, 0.0], *[[np.cos(angle), np.sin(angle)]] * (count - 1)])
    assert mean_cosine(embeddings)[0] == pytest.approx(published, abs=1e-6)
    assert leave_one_out(embeddings)[0] == pytest.approx(others, abs=1e-6)


def test_a_zero_vector_agrees_with_nobody_and_is_no_number_trouble():
    assert mean_cosine(np.array([[0.0, 0.0], [1.0, 0.0]])) == pytest.approx([0, 0.5])
    assert unit(np.array([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0.0, 0.0], [0.6, 0.8]]


def test_a_planted_outlier_has_the_lowest_score_wherever_it_stands():
    rng = np.random.default_rng(0)
    center = rng.normal(size=32)
    for place in range(5):
        embeddings = center + 0.1 * rng.normal(size=(5, 32))
        embeddings[place] = rng.normal(size=32)
        for score in (mean_cosine, leave_one_out):
            assert int(np.argmin(score(embeddings))) == place
            assert best(score(embeddings)) != place


def test_vote_is_the_share_of_equal_answers():
    answers = ["A dog.", "dog", "The Dog", "cat"]
    assert vote(answers) == pytest.approx([0.75, 0.75, 0.75, 0.25])
    assert vote(["2", "3"]) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("  The   Answer ", "answer"),
        ("an apple", "apple"),
        ('"Yes!"', "yes"),
        ("**(blue)**", "blue"),
        ("theatre and banana", "theatre and banana"),
        ("3.5", "3.5"),
        ("A", "a"),
        ("(A).", "a"),
    ],
)
def test_normal_forms(answer, expected):
    assert normal(answer) == expected


def test_letters_of_options_stay_different():
    assert vote(["A", "A", "B"]) == pytest.approx([2 / 3, 2 / 3, 1 / 3])


def test_the_first_of_equals_wins():
    assert best(np.array([0.2, 0.7, 0.7, 0.1])) == 1


def test_rejected_is_drawn_from_the_lower_half():
    texts = ["a", "b", "c", "d", "e"]
    scores = np.array([0.9, 0.1, 0.5, 0.2, 0.8])  # the lower half are the floor(5 / 2) = 2 lowest: b and d
    drawn = {pick_rejected(texts, scores, 0, seed) for seed in range(50)}
    assert drawn == {1, 3}


def test_rejected_depends_on_the_seed_alone():
    texts, scores = [str(number) for number in range(40)], np.linspace(0, 1, 40)
    first = [pick_rejected(texts, scores, 39, seed) for seed in range(20)]
    assert first == [pick_rejected(texts, scores, 39, seed) for seed in range(20)]
    assert len(set(first)) > 5


def test_rejected_never_says_the_same_as_the_chosen():
    scores = np.array([0.1, 0.2, 0.8, 0.9])
    assert {pick_rejected(["same ", "other", "x", "same"], scores, 3, seed) for seed in range(30)} == {1}
    assert pick_rejected(["same", " same\n", "x", "same"], scores, 3, 0) is None
    assert pick_rejected(["a", "a"], np.array([1.0, 1.0]), 0, 0) is None
