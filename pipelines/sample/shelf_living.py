"""Shelves of the sample shop: audio, desk, garden, pets."""

from __future__ import annotations

from pipelines.sample.vocabulary import (
    ADJUSTABLE,
    ALUMINUM,
    COMPACT,
    COTTON,
    EASY_CARE,
    FOLDABLE,
    HANDMADE,
    LIGHTWEIGHT,
    NON_SLIP,
    PLASTIC,
    POLYESTER,
    STEEL,
    STURDY,
    WEATHERPROOF,
    Attribute,
    Category,
    Noun,
    Word,
    same,
)

AUDIO = Category(
    name=("Audio", "Audio", "Audio"),
    nouns=(
        Noun("headphones/p", "Kopfhörer/m", "casque audio/m", (40, 380), (160, 340), ("headphone stand", "music player")),
        Noun("earbuds/p", "Ohrhörer/p", "écouteurs/mp", (25, 260), (30, 80), ("music player", "portable speaker")),
        Noun("portable speaker/s", "Reiselautsprecher/m", "enceinte portable/f", (30, 320), (300, 1800), ("music player", "earbuds")),
        Noun("bookshelf speaker/s", "Regallautsprecher/m", "enceinte d'étagère/f", (90, 780), (2500, 7500), ("turntable", "amplifier")),
        Noun("turntable/s", "Plattenspieler/m", "platine vinyle/f", (120, 950), (3500, 9500), ("amplifier", "bookshelf speaker")),
        Noun("amplifier/s", "Verstärker/m", "amplificateur/m", (110, 990), (2500, 9500), ("bookshelf speaker", "turntable")),
        Noun("music player/s", "Musikspieler/m", "baladeur/m", (60, 420), (80, 260), ("headphones", "earbuds")),
        Noun("headphone stand/s", "Kopfhörerhalter/m", "support de casque/m", (15, 80), (250, 900), ("headphones", "amplifier")),
    ),
    materials=(ALUMINUM, PLASTIC, Word("walnut", "Nussbaum", "noyer"), Word("bamboo", "Bambus", "bambou")),
    features=(
        COMPACT,
        STURDY,
        LIGHTWEIGHT,
        Word("repairable", "reparierbar", "réparable"),
        Word("shockproof", "stoßfest", "=antichoc"),
        Word("splash-proof", "spritzwassergeschützt", "=anti-éclaboussures"),
    ),
    details=(
        Attribute(
            ("Connection", "Anschluss", "Connexion"),
            (
                ("wireless", "kabellos", "sans fil"),
                ("cable", "Kabel", "filaire"),
                ("wireless and cable", "kabellos und Kabel", "sans fil et filaire"),
            ),
        ),
        Attribute(("Cable length", "Kabellänge", "Longueur du câble"), same("1 m", "2 m", "3 m")),
    ),
    share=3,
)

OFFICE = Category(
    name=("Office", "Büro", "Bureau"),
    nouns=(
        Noun("keyboard/s", "Tastatur/f", "clavier/m", (30, 220), (450, 1200), ("computer mouse", "wrist rest")),
        Noun("computer mouse/s", "Computermaus/f", "souris/f", (15, 120), (70, 150), ("keyboard", "wrist rest")),
        Noun("monitor stand/s", "Monitorständer/m", "support d'écran/m", (25, 160), (1200, 4500), ("keyboard", "desk lamp")),
        Noun("laptop stand/s", "Laptopständer/m", "support d'ordinateur/m", (20, 110), (400, 1600), ("keyboard", "computer mouse")),
        Noun("wrist rest/s", "Handballenauflage/f", "repose-poignet/m", (10, 45), (150, 500), ("keyboard", "computer mouse")),
        Noun("desk organizer/s", "Schreibtischordner/m", "range-documents/m", (12, 70), (300, 1500), ("pen holder", "letter tray")),
        Noun("pen holder/s", "Stifthalter/m", "pot à crayons/m", (8, 40), (120, 500), ("desk organizer", "letter tray")),
        Noun("letter tray/s", "Briefablage/f", "corbeille à courrier/f", (10, 60), (300, 1200), ("desk organizer", "pen holder")),
    ),
    materials=(ALUMINUM, PLASTIC, Word("beech", "Buche", "hêtre"), Word("cork", "Kork", "liège")),
    features=(
        ADJUSTABLE,
        NON_SLIP,
        COMPACT,
        STURDY,
        Word("ergonomic", "ergonomisch", "ergonomique"),
        Word("wear-resistant", "abriebfest", "=anti-usure"),
    ),
    details=(
        Attribute(("Width", "Breite", "Largeur"), same("12 cm", "24 cm", "36 cm", "48 cm")),
        Attribute(
            ("Position", "Aufstellung", "Position"),
            (("left", "links", "à gauche"), ("right", "rechts", "à droite"), ("both sides", "beidseitig", "des deux côtés")),
        ),
    ),
    share=3,
)

GARDEN = Category(
    name=("Garden", "Garten", "Jardin"),
    nouns=(
        Noun("watering can/s", "Gießkanne/f", "arrosoir/m", (12, 70), (400, 1500), ("planter", "bird feeder")),
        Noun("planter/s", "Pflanzkübel/m", "jardinière/f", (15, 140), (800, 6500), ("watering can", "hand trowel")),
        Noun("hand trowel/s", "Pflanzkelle/f", "transplantoir/m", (8, 40), (120, 350), ("planter", "hand rake")),
        Noun("hand rake/s", "Handharke/f", "griffe à main/f", (8, 40), (150, 400), ("hand trowel", "planter")),
        Noun("garden bench/s", "Gartenbank/f", "banc de jardin/m", (90, 620), (9000, 26000), ("garden table", "planter")),
        Noun("garden table/s", "Gartentisch/m", "table de jardin/f", (70, 580), (7000, 28000), ("garden bench", "lantern")),
        Noun("bird feeder/s", "Futterhaus/n", "mangeoire/f", (15, 90), (400, 2500), ("watering can", "bird bath")),
        Noun("bird bath/s", "Vogeltränke/f", "bain d'oiseaux/m", (15, 110), (700, 4500), ("bird feeder", "planter")),
    ),
    materials=(STEEL, PLASTIC, Word("copper", "Kupfer", "cuivre"), Word("acacia wood", "Akazienholz", "acacia")),
    features=(
        WEATHERPROOF,
        STURDY,
        LIGHTWEIGHT,
        HANDMADE,
        Word("frost-proof", "frostsicher", "=anti-gel"),
        Word("durable", "langlebig", "durable"),
    ),
    details=(
        Attribute(("Height", "Höhe", "Hauteur"), same("20 cm", "35 cm", "50 cm", "75 cm")),
        Attribute(
            ("Place", "Standort", "Emplacement"),
            (
                ("balcony", "Balkon", "balcon"),
                ("patio", "Terrasse", "terrasse"),
                ("flower bed", "Beet", "plate-bande"),
                ("lawn", "Rasen", "pelouse"),
            ),
        ),
    ),
    share=3,
)

PETS = Category(
    name=("Pets", "Haustiere", "Animaux"),
    nouns=(
        Noun("dog bed/s", "Hundebett/n", "panier pour chien/m", (25, 160), (900, 4200), ("pet blanket", "dog toy")),
        Noun("dog harness/s", "Hundegeschirr/n", "harnais pour chien/m", (15, 80), (120, 450), ("dog leash", "dog collar")),
        Noun("dog collar/s", "Hundehalsband/n", "collier pour chien/m", (8, 55), (40, 180), ("dog leash", "dog harness")),
        Noun("dog leash/s", "Hundeleine/f", "laisse/f", (8, 60), (90, 400), ("dog collar", "dog harness")),
        Noun("dog coat/s", "Hundemantel/m", "manteau pour chien/m", (18, 95), (150, 600), ("dog harness", "dog bed")),
        Noun("pet blanket/s", "Tierdecke/f", "plaid pour animaux/m", (12, 60), (300, 1100), ("dog bed", "cat cave")),
        Noun("cat cave/s", "Katzenhöhle/f", "niche pour chat/f", (20, 110), (500, 2200), ("pet blanket", "dog toy")),
        Noun("dog toy/s", "Hundespielzeug/n", "jouet pour chien/m", (6, 30), (60, 300), ("dog bed", "dog leash")),
    ),
    materials=(COTTON, POLYESTER, Word("hemp", "Hanf", "chanvre"), Word("felt", "Filz", "feutre")),
    features=(
        EASY_CARE,
        STURDY,
        FOLDABLE,
        LIGHTWEIGHT,
        Word("washable", "waschbar", "lavable"),
        Word("soft", "weich", "doux|douce"),
    ),
    details=(
        Attribute(("Max. weight", "Gewicht bis", "Poids maximal"), same("5 kg", "10 kg", "20 kg", "40 kg")),
        Attribute(
            ("Age", "Alter", "Âge"),
            (("young", "jung", "jeune"), ("adult", "ausgewachsen", "adulte"), ("senior", "älter", "âgé")),
        ),
    ),
    sizes=("XS", "S", "M", "L", "XL"),
    share=3,
)
