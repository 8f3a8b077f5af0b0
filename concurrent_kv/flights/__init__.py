"""One computation for each missing key, over threads and event loops."""

from .table import Claim, Flight, FlightState, FlightTable

__all__ = ["Claim", "Flight", "FlightState", "FlightTable"]
