"""The ground floor: mesh, logical axes, the batch, precision. Imports nothing else of jaxrec."""
