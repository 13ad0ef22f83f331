"""The front of a search within a budget of accuracy: its metric against bytes and milliseconds, as a picture and a page."""

from muntin.reporting.front.page import write_front
from muntin.reporting.front.picture import front_svg
from muntin.reporting.front.schema import FrontPoint, FrontRecord
from muntin.reporting.front.search_page import SearchRecord, write_search

__all__ = ["FrontPoint", "FrontRecord", "SearchRecord", "front_svg", "write_front", "write_search"]
