import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's `&` makes it so, and tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

def pytest_addoption(parser):
    parser.addoption('--site', help='folder of the built site to try in the browser (default: a preview is made)')
