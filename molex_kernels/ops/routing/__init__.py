"""Choosing experts: top-k and adaptive-clustering routers, the plan, and the auxiliary losses."""
