"""Row-sharded embedding tables: placement, look-up, row optimizers. The seam that the exchange engine fills."""
