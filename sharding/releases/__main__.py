"""`python -m sharding.releases`; apart from write.py, since processes that are spawned cannot import a `__main__`."""

from sharding.releases.write import main

main()
