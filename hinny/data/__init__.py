"""From text to training batches: `prepare` writes shards, `mix` reads them as a stream, `synthetic` adds recall."""
