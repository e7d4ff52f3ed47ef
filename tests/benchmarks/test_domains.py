"""What the program for domains makes of ranks: users are paired by their keys, shop by shop."""

import numpy as np
import pytest

KEYS = np.array(["beauty:10", "beauty:2", "sports:2", "sports:9"], dtype=object)


def seeds_of(module, users, ranks):
    figures = {"metrics": {"hr@10": 0.0, "ndcg@10": 0.0}}
    return [module("suite").Seed(figures, np.array(ranks), users) for _ in range(2)]


def test_a_user_is_compared_with_itself(module):
    program = module("domains")
    joint = seeds_of(module, KEYS, [0, 5, 100, 0])
    alone = seeds_of(module, np.array([2, 10]), [100, 0])  # numbers ascend otherwise than texts do
    found = program.report({"joint": joint}, alone, "beauty")
    assert found["users"] == 2
    assert found["alone"]["hr@10"] == [0.5, 0.5]
    assert found["joint"]["hr@10"] == [1.0, 1.0]
    gain = 1 / np.log2(7)  # user 2 comes sixth in place of not at all
    assert found["joint"]["against_alone"]["difference"] == pytest.approx(gain / 2)


def test_other_users_are_not_compared(module):
    program = module("domains")
    joint = seeds_of(module, KEYS, [0, 5, 100, 0])
    with pytest.raises(ValueError, match="sports: 'joint' and 'alone' ranked other users"):
        program.report({"joint": joint}, seeds_of(module, np.array([2, 10]), [0, 1]), "sports")
