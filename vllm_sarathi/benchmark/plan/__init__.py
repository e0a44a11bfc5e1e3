"""What to buy: the cheapest deployment that keeps the SLOs."""
