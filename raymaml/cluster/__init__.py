"""Ray: Data streams, Train learns, Tune judges. The only package that imports ray."""
