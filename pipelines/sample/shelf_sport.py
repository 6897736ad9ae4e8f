"""Shelves of the sample shop: what people wear and take outside."""

from __future__ import annotations

from pipelines.sample.vocabulary import (
    ADJUSTABLE,
    ALUMINUM,
    AUDIENCE,
    BREATHABLE,
    COMPACT,
    COTTON,
    EASY_CARE,
    FOLDABLE,
    LIGHTWEIGHT,
    NON_SLIP,
    PLASTIC,
    POLYESTER,
    STEEL,
    STURDY,
    WATERPROOF,
    WEATHERPROOF,
    Attribute,
    Category,
    Noun,
    Word,
    same,
)

SHOES = Category(
    name=("Shoes", "Schuhe", "Chaussures"),
    nouns=(
        Noun("trail shoes/p", "Trailschuhe/p", "chaussures de trail/fp", (60, 190), (450, 900), ("hiking socks", "base layer")),
        Noun("hiking boots/p", "Wanderstiefel/p", "chaussures de randonnée/fp", (80, 260), (800, 1500), ("hiking socks", "backpack")),
        Noun("running shoes/p", "Laufschuhe/p", "chaussures de course/fp", (50, 180), (400, 750), ("shorts", "base layer")),
        Noun("ankle boots/p", "Stiefeletten/p", "bottines/fp", (60, 220), (600, 1200), ("dress", "cardigan")),
        Noun("sneakers/p", "Turnschuhe/p", "baskets/fp", (40, 140), (500, 900), ("t-shirt", "hooded sweatshirt")),
        Noun("sandals/p", "Sandalen/p", "sandales/fp", (25, 110), (300, 700), ("shorts", "dress")),
        Noun("slippers/p", "Hausschuhe/p", "chaussons/mp", (15, 60), (200, 500), ("blanket", "cardigan")),
        Noun("winter boots/p", "Winterstiefel/p", "bottes d'hiver/fp", (70, 240), (900, 1800), ("hiking socks", "jacket")),
    ),
    materials=(
        Word("leather", "Leder", "cuir"),
        Word("suede", "Veloursleder", "daim"),
        Word("canvas", "Segeltuch", "toile"),
        Word("mesh", "Netzgewebe", "maille"),
        POLYESTER,
    ),
    features=(
        WATERPROOF,
        LIGHTWEIGHT,
        BREATHABLE,
        NON_SLIP,
        Word("cushioned", "gedämpft", "amorti|amortie"),
        Word("hard-wearing", "strapazierfähig", "résistant|résistante"),
    ),
    details=(
        AUDIENCE,
        Attribute(
            ("Closure", "Verschluss", "Fermeture"),
            (
                ("laces", "Schnürsenkel", "lacets"),
                ("zip", "Reißverschluss", "fermeture éclair"),
                ("hook and loop", "Klettverschluss", "bande auto-agrippante"),
                ("slip-on", "zum Hineinschlüpfen", "à enfiler"),
            ),
        ),
    ),
    sizes=("37", "38", "39", "40", "41", "42", "43", "44", "45"),
    share=4,
)

CLOTHING = Category(
    name=("Clothing", "Bekleidung", "Vêtements"),
    nouns=(
        Noun("jacket/s", "Jacke/f", "veste/f", (60, 320), (350, 1200), ("winter boots", "cardigan")),
        Noun("shirt/s", "Hemd/n", "chemise/f", (25, 110), (180, 350), ("trousers", "cardigan")),
        Noun("t-shirt/s", "T-Shirt/n", "t-shirt/m", (12, 55), (120, 220), ("shorts", "sneakers")),
        Noun("hooded sweatshirt/s", "Kapuzenpullover/m", "sweat à capuche/m", (35, 120), (400, 700), ("sneakers", "trousers")),
        Noun("trousers/p", "Hose/f", "pantalon/m", (35, 160), (350, 700), ("shirt", "sneakers")),
        Noun("shorts/p", "Shorts/p", "short/m", (20, 80), (150, 350), ("t-shirt", "sandals")),
        Noun("dress/s", "Kleid/n", "robe/f", (35, 180), (200, 500), ("sandals", "cardigan")),
        Noun("hiking socks/p", "Wandersocken/p", "chaussettes de randonnée/fp", (9, 30), (50, 120), ("hiking boots", "trail shoes")),
        Noun("cardigan/s", "Strickjacke/f", "gilet/m", (45, 190), (300, 650), ("shirt", "dress")),
        Noun("base layer/s", "Funktionsunterhemd/n", "sous-vêtement technique/m", (25, 110), (120, 260), ("jacket", "hiking socks")),
    ),
    materials=(
        COTTON,
        Word("merino wool", "Merinowolle", "laine mérinos"),
        Word("linen", "Leinen", "lin"),
        Word("hemp", "Hanf", "chanvre"),
        POLYESTER,
    ),
    features=(
        BREATHABLE,
        LIGHTWEIGHT,
        EASY_CARE,
        Word("soft", "weich", "doux|douce"),
        Word("quick-drying", "schnelltrocknend", "=à séchage rapide"),
        Word("warm", "warm", "chaud|chaude"),
    ),
    details=(
        AUDIENCE,
        Attribute(
            ("Fit", "Passform", "Coupe"),
            (("regular", "normal", "classique"), ("slim", "schmal", "ajustée"), ("relaxed", "weit", "ample")),
        ),
    ),
    sizes=("XS", "S", "M", "L", "XL", "XXL"),
    share=5,
)

CAMPING = Category(
    name=("Camping", "Camping", "Camping"),
    nouns=(
        Noun("tent/s", "Zelt/n", "tente/f", (90, 480), (1800, 6500), ("sleeping bag", "sleeping mat")),
        Noun("sleeping bag/s", "Schlafsack/m", "sac de couchage/m", (50, 320), (700, 2200), ("sleeping mat", "tent")),
        Noun("sleeping mat/s", "Isomatte/f", "matelas de sol/m", (25, 180), (350, 1200), ("sleeping bag", "tent")),
        Noun("backpack/s", "Rucksack/m", "sac à dos/m", (45, 260), (700, 2200), ("hiking boots", "dry bag")),
        Noun("dry bag/s", "Packsack/m", "sac étanche/m", (12, 70), (80, 350), ("backpack", "tent")),
        Noun("hammock/s", "Hängematte/f", "hamac/m", (30, 120), (400, 1500), ("tarp", "sleeping mat")),
        Noun("camping chair/s", "Campingstuhl/m", "chaise de camping/f", (25, 130), (900, 3500), ("tent", "hammock")),
        Noun("tarp/s", "Zeltplane/f", "bâche/f", (25, 140), (500, 1600), ("hammock", "tent")),
    ),
    materials=(
        POLYESTER,
        Word("nylon", "Nylon", "nylon"),
        Word("canvas", "Segeltuch", "toile"),
        Word("hemp", "Hanf", "chanvre"),
    ),
    features=(
        Word("windproof", "winddicht", "=coupe-vent"),
        LIGHTWEIGHT,
        COMPACT,
        FOLDABLE,
        Word("tear-resistant", "reißfest", "indéchirable"),
        WEATHERPROOF,
    ),
    details=(
        Attribute(
            ("Season", "Saison", "Saison"),
            (("summer", "Sommer", "été"), ("three seasons", "drei Jahreszeiten", "trois saisons"), ("winter", "Winter", "hiver")),
        ),
        Attribute(("Pack size", "Packmaß", "Taille repliée"), same("30 x 15 cm", "40 x 18 cm", "50 x 20 cm", "60 x 22 cm")),
    ),
    share=3,
)

CYCLING = Category(
    name=("Cycling", "Fahrrad", "Vélo"),
    nouns=(
        Noun("bike light/s", "Fahrradlampe/f", "éclairage de vélo/m", (15, 110), (80, 260), ("bike bell", "mudguards")),
        Noun("bike pump/s", "Luftpumpe/f", "pompe à vélo/f", (12, 70), (120, 900), ("bottle cage", "phone mount")),
        Noun("bike bell/s", "Fahrradklingel/f", "sonnette de vélo/f", (6, 40), (30, 140), ("bike light", "bike basket")),
        Noun("bike basket/s", "Fahrradkorb/m", "panier de vélo/m", (20, 90), (500, 1500), ("luggage rack", "bike bell")),
        Noun("luggage rack/s", "Gepäckträger/m", "porte-bagages/m", (25, 140), (500, 1300), ("bike basket", "mudguards")),
        Noun("mudguards/p", "Schutzbleche/p", "garde-boue/mp", (15, 80), (250, 700), ("luggage rack", "bike light")),
        Noun("phone mount/s", "Handyhalter/m", "support de téléphone/m", (12, 60), (60, 180), ("bike light", "bottle cage")),
        Noun("bottle cage/s", "Flaschenhalter/m", "porte-bidon/m", (6, 45), (25, 90), ("bike pump", "phone mount")),
    ),
    materials=(
        ALUMINUM,
        STEEL,
        PLASTIC,
    ),
    features=(
        WEATHERPROOF,
        LIGHTWEIGHT,
        STURDY,
        COMPACT,
        Word("rustproof", "rostfrei", "inoxydable"),
        ADJUSTABLE,
    ),
    details=(
        Attribute(
            ("Use", "Einsatz", "Usage"),
            (
                ("city", "Stadt", "ville"),
                ("touring", "Reise", "voyage"),
                ("mountain", "Gelände", "montagne"),
                ("racing", "Rennen", "course"),
            ),
        ),
        Attribute(
            ("Mounting", "Befestigung", "Fixation"),
            (("without tools", "werkzeuglos", "sans outil"), ("screws", "Schrauben", "vis"), ("strap", "Riemen", "sangle")),
        ),
    ),
    share=3,
)
