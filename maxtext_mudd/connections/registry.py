"""The families of depth connections by their names."""

from maxtext_mudd.connections.hyper_connections.connection import HyperConnection
from maxtext_mudd.connections.mudd.aggregate import DenseConnection

# Without aggregates a dense connection is the plain residual.
FAMILIES = {"dense": DenseConnection, "hyper_connections": HyperConnection, "residual": DenseConnection}
