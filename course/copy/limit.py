# ------------------------------------------------------------------ a test may take so many seconds
import signal  # noqa: E402

LIMIT = int(os.environ.get("TEST_SECONDS", 120))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """Fail a test that does not end; where there is no alarm clock (Windows), wait."""
    def ring(number, frame):
        pytest.fail(f"took more than {LIMIT} s: an endless loop?", pytrace=False)

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
