"""The whole shop: twelve categories, and every product type with its place on the shelves."""

from __future__ import annotations

from pipelines.sample.shelf_home import BEDDING, FURNITURE, KITCHEN, LIGHTING
from pipelines.sample.shelf_living import AUDIO, GARDEN, OFFICE, PETS
from pipelines.sample.shelf_sport import CAMPING, CLOTHING, CYCLING, SHOES
from pipelines.sample.vocabulary import Noun

CATEGORIES = (SHOES, CLOTHING, CAMPING, CYCLING, KITCHEN, FURNITURE, BEDDING, LIGHTING, AUDIO, OFFICE, GARDEN, PETS)

NOUNS: tuple[Noun, ...] = tuple(noun for category in CATEGORIES for noun in category.nouns)
CATEGORY_OF_NOUN: tuple[int, ...] = tuple(number for number, category in enumerate(CATEGORIES) for _ in category.nouns)
