"""Real servers and injected faults for the test suite; knows nothing of crossenc itself."""
