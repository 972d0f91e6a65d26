"""From release folders to shards: manifest, build, verify, quality, and made-up patients."""
