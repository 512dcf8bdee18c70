from dynamixer import progress as module
from dynamixer.logs import log
from dynamixer.progress import progress


def test_what_is_said_is_said_as_it_is(capsys):
    log("photos:100:cat.png is [bold]bad[/bold]")
    assert capsys.readouterr().err == "photos:100:cat.png is [bold]bad[/bold]\n"


def test_without_a_terminal_a_line_is_printed_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY", 0.0)
    with progress("counting", 10) as meter:
        meter.advance(4, loss=1.25)
        meter.advance(6, loss=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("counting: 4/10  loss 1.25")
    assert "images/s" in lines[1]
    assert lines[1].endswith("0 s left")
    assert meter.done == 10


def test_on_a_terminal_a_bar_moves(monkeypatch):
    monkeypatch.setattr(module, "is_live", lambda: True)
    with progress("counting", 10) as meter:
        meter.advance(4, loss=1.25)
        assert meter.bar.tasks[0].completed == 4
        assert "loss 1.25" in meter.bar.tasks[0].fields["note"]
