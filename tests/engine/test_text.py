from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pymistral.engine.text import TextStream

from .fakes import ByteStream


def run(text: str, stops: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(ByteStream(True), stops)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        if stream.matched is not None:
            break
    pieces.append(stream.finish())
    return pieces, stream


@given(st.text("ab\u00e9", max_size=40), st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    pieces, stream = run(text, stops)
    # The stop string that is complete first wins; of several that end at once, the one that begins first.
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert "".join(pieces) == stream.text == (text[: min(ends)[1]] if ends else text)
    assert (stream.matched is not None) == bool(ends)


@given(st.text(max_size=40))
def test_without_stops_nothing_is_held_back(text: str) -> None:
    pieces, _ = run(text, [])
    assert "".join(pieces) == text
    assert pieces[-1] == ""


def test_holds_back_no_more_than_it_must() -> None:
    assert run("xENDy", ["ENDING"])[0] == ["x", "", "", "", "ENDy", ""]
    assert run("aab", ["ab"])[0] == ["", "a", "", ""]
