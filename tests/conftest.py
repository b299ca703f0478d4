def pytest_addoption(parser):
    parser.addoption('--site', help='folder of the built site to try in the browser (default: a preview is made)')
