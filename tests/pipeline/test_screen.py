"""What the user sees: plain lines where there is no terminal, nothing where nothing was asked for."""

import io

import rich.console

from pipeline.screen import Screen


def shown(act, terminal=False):
    stream = io.StringIO()
    screen = Screen(rich.console.Console(file=stream, force_terminal=terminal, width=120))
    screen.start(3)
    act(screen)
    return stream.getvalue()


def work(screen):
    with screen.step("train", 1):
        screen.progress(1, 2, "epoch 1/2 loss 0.5")
        screen.warn("no validation rows")


def test_plain_lines_have_start_note_and_end():
    lines = shown(work).splitlines()
    assert lines[0] == "  start    train"
    assert lines[1] == "  note     no validation rows"
    assert lines[2].startswith("  done     train  0.")
    assert lines[2].endswith("(epoch 1/2 loss 0.5)")


def test_a_terminal_sees_number_and_progress():
    text = shown(work, terminal=True)
    assert "2/3 train" in text
    assert "done     train" in text


def test_square_brackets_in_a_message_are_text_not_markup():
    assert "[red]x[/red]" in shown(lambda screen: screen.failed("export", "[red]x[/red]"))


def test_a_silent_screen_takes_everything():
    screen = Screen.silent()
    screen.start(1)
    work(screen)
    screen.cached("train")
    screen.waiting("train")
    screen.failed("train", "why")
    assert screen._note == "epoch 1/2 loss 0.5"
