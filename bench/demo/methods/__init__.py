"""The demo's second page: every method teaches the same small student the same digits."""
