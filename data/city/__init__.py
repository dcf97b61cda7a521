"""A synthetic city, ray cast and written as a nuScenes dataroot."""

from data.city.config import CityConfig
from data.city.generate import generate

__all__ = ["CityConfig", "generate"]
