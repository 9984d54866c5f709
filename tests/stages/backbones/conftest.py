from tests.stub_hub import stub_hub  # noqa: F401  a fixture
