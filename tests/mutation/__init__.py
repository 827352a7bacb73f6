"""Plants faults in the sources, one at a time, and shows that the tests see each of them; see __main__.py."""
