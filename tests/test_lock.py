import errno
import fcntl
import multiprocessing
import os

from dynamixer.lock import locked, unlock


def opened(path):
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def test_one_at_a_time(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    assert locked(first)
    assert not locked(second, patience=0.1)
    unlock(first)
    assert locked(second)
    unlock(second)


def test_what_was_forked_does_not_keep_a_lock_that_was_let_go(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    assert locked(first)
    context = multiprocessing.get_context("fork")
    done = context.Event()
    child = context.Process(target=done.wait)
    child.start()
    unlock(first)
    assert locked(second)
    done.set()
    child.join()
    unlock(second)


def test_a_file_system_without_locks_is_said_and_stops_nobody(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    file = opened(tmp_path)
    assert locked(file)
    unlock(file)
    assert "no lock can be had here (No locks available)" in capsys.readouterr().err
