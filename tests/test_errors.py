"""An error is one line of printable characters, whatever it quotes."""

import pickle

from pipeline.errors import MOST_CHARACTERS, CheckpointError, StageFailed


def test_what_a_terminal_would_act_on_is_shown_by_its_escape():
    error = CheckpointError("config.json: names \x1b[2J\nrequant: all is well \ud800\0; fix it — é")
    assert str(error) == r"config.json: names \x1b[2J requant: all is well \ud800\x00; fix it — é"


def test_a_long_one_keeps_its_beginning_and_its_remedy():
    said = str(CheckpointError(f"x.safetensors: names {'a' * 10**6}; download it again"))
    assert len(said) <= MOST_CHARACTERS
    assert said.startswith("x.safetensors: names aaa")
    assert said.endswith("aaa; download it again")


def test_it_comes_whole_through_a_pipe():
    error = pickle.loads(pickle.dumps(StageFailed("a\nb", "the\ntrace")))
    assert (str(error), error.trace) == ("a b", "the\ntrace")
