"""Shelves of the sample shop: kitchen, furniture, bedding, lighting."""

from __future__ import annotations

from pipelines.sample.vocabulary import (
    ADJUSTABLE,
    ALUMINUM,
    BRASS,
    BREATHABLE,
    COTTON,
    EASY_CARE,
    HANDMADE,
    OAK,
    STEEL,
    STURDY,
    TIMELESS,
    Attribute,
    Category,
    Noun,
    Word,
    same,
)

KITCHEN = Category(
    name=("Kitchen", "Küche", "Cuisine"),
    nouns=(
        Noun("frying pan/s", "Bratpfanne/f", "poêle/f", (25, 160), (900, 2600), ("saucepan", "baking dish")),
        Noun("saucepan/s", "Kochtopf/m", "casserole/f", (25, 180), (800, 2800), ("frying pan", "colander")),
        Noun("kettle/s", "Wasserkessel/m", "bouilloire/f", (30, 140), (900, 1800), ("teapot", "storage jar")),
        Noun("teapot/s", "Teekanne/f", "théière/f", (20, 110), (500, 1300), ("kettle", "storage jar")),
        Noun("baking dish/s", "Auflaufform/f", "plat à four/m", (15, 90), (700, 2600), ("salad bowl", "frying pan")),
        Noun("salad bowl/s", "Salatschüssel/f", "saladier/m", (15, 80), (400, 1700), ("baking dish", "colander")),
        Noun("storage jar/s", "Vorratsdose/f", "bocal/m", (8, 45), (250, 900), ("teapot", "salad bowl")),
        Noun("colander/s", "Sieb/n", "passoire/f", (10, 60), (250, 900), ("saucepan", "salad bowl")),
    ),
    materials=(
        STEEL,
        Word("ceramic", "Keramik", "céramique"),
        Word("copper", "Kupfer", "cuivre"),
        Word("enamel", "Emaille", "émail"),
    ),
    features=(
        Word("dishwasher-safe", "spülmaschinenfest", "=compatible lave-vaisselle"),
        Word(
            "heat-resistant",
            "hitzebeständig",
            "résistant à la chaleur|résistante à la chaleur|résistants à la chaleur|résistantes à la chaleur",
        ),
        HANDMADE,
        STURDY,
        EASY_CARE,
        Word("stackable", "stapelbar", "empilable"),
    ),
    details=(
        Attribute(("Diameter", "Durchmesser", "Diamètre"), same("16 cm", "20 cm", "24 cm", "28 cm")),
        Attribute(("Capacity", "Volumen", "Contenance"), same("1 l", "2 l", "3 l", "4 l")),
    ),
    share=4,
)

FURNITURE = Category(
    name=("Furniture", "Möbel", "Meubles"),
    nouns=(
        Noun("dining table/s", "Esstisch/m", "table à manger/f", (190, 1400), (22000, 60000), ("dining chair", "pendant lamp")),
        Noun("dining chair/s", "Esszimmerstuhl/m", "chaise/f", (50, 320), (4000, 9000), ("dining table", "pendant lamp")),
        Noun("bookcase/s", "Bücherregal/n", "bibliothèque/f", (80, 700), (15000, 55000), ("armchair", "floor lamp")),
        Noun("armchair/s", "Sessel/m", "fauteuil/m", (150, 900), (12000, 32000), ("floor lamp", "side table")),
        Noun("side table/s", "Beistelltisch/m", "table d'appoint/f", (40, 280), (3000, 12000), ("armchair", "table lamp")),
        Noun("desk/s", "Schreibtisch/m", "bureau/m", (120, 900), (18000, 45000), ("desk lamp", "monitor stand")),
        Noun("sideboard/s", "Kommode/f", "buffet/m", (180, 1200), (25000, 65000), ("table lamp", "dining table")),
        Noun("bed frame/s", "Bettgestell/n", "cadre de lit/m", (160, 1100), (25000, 70000), ("duvet cover", "mattress topper")),
    ),
    materials=(
        OAK,
        Word("beech", "Buche", "hêtre"),
        Word("walnut", "Nussbaum", "noyer"),
        Word("steel", "Stahl", "acier"),
        Word("rattan", "Rattan", "rotin"),
    ),
    features=(
        STURDY,
        EASY_CARE,
        HANDMADE,
        Word("space-saving", "platzsparend", "peu encombrant|peu encombrante"),
        Word("scratch-resistant", "kratzfest", "=anti-rayures"),
        TIMELESS,
    ),
    details=(
        Attribute(("Width", "Breite", "Largeur"), same("45 cm", "60 cm", "80 cm", "120 cm", "160 cm")),
        Attribute(
            ("Assembly", "Montage", "Montage"),
            (("assembled", "montiert", "livré monté"), ("easy", "einfach", "facile"), ("two people", "zu zweit", "à deux personnes")),
        ),
    ),
    share=3,
)

BEDDING = Category(
    name=("Bedding", "Bettwaren", "Literie"),
    nouns=(
        Noun("duvet cover/s", "Bettbezug/m", "housse de couette/f", (25, 180), (700, 1800), ("fitted sheet", "duvet")),
        Noun("fitted sheet/s", "Spannbettlaken/n", "drap-housse/m", (15, 90), (400, 1100), ("duvet cover", "mattress topper")),
        Noun("flat sheet/s", "Betttuch/n", "drap plat/m", (15, 90), (400, 1200), ("duvet cover", "bedspread")),
        Noun("duvet/s", "Bettdecke/f", "couette/f", (40, 320), (900, 2600), ("duvet cover", "fitted sheet")),
        Noun("mattress topper/s", "Matratzenauflage/f", "surmatelas/m", (60, 380), (2500, 9000), ("fitted sheet", "bed frame")),
        Noun("mattress protector/s", "Matratzenschoner/m", "protège-matelas/m", (15, 90), (400, 1500), ("fitted sheet", "mattress topper")),
        Noun("bedspread/s", "Tagesdecke/f", "couvre-lit/m", (35, 220), (900, 2800), ("flat sheet", "bed frame")),
        Noun("blanket/s", "Wolldecke/f", "couverture/f", (30, 190), (700, 2200), ("bedspread", "armchair")),
    ),
    materials=(
        COTTON,
        Word("linen", "Leinen", "lin"),
        Word("new wool", "Schurwolle", "laine vierge"),
        Word("lyocell", "Lyocell", "lyocell"),
    ),
    features=(
        Word("soft", "weich", "doux|douce"),
        BREATHABLE,
        EASY_CARE,
        Word("cooling", "kühlend", "rafraîchissant|rafraîchissante"),
        Word("warming", "wärmend", "bien chaud|bien chaude"),
        Word("hypoallergenic", "allergikerfreundlich", "=anti-allergie"),
    ),
    details=(
        Attribute(("Wash", "Wäsche", "Lavage"), same("30 °C", "40 °C", "60 °C")),
        Attribute(
            ("Pattern", "Muster", "Motif"),
            (
                ("plain", "einfarbig", "uni"),
                ("striped", "gestreift", "rayures"),
                ("checked", "kariert", "carreaux"),
                ("dots", "Punkte", "pois"),
            ),
        ),
    ),
    sizes=("90x200 cm", "140x200 cm", "160x200 cm", "180x200 cm", "200x200 cm"),
    share=3,
)

LIGHTING = Category(
    name=("Lighting", "Leuchten", "Luminaires"),
    nouns=(
        Noun("pendant lamp/s", "Pendelleuchte/f", "suspension/f", (40, 420), (800, 4500), ("dining table", "ceiling lamp")),
        Noun("table lamp/s", "Tischleuchte/f", "lampe de table/f", (25, 260), (700, 3200), ("side table", "floor lamp")),
        Noun("desk lamp/s", "Schreibtischlampe/f", "lampe de bureau/f", (25, 240), (800, 3000), ("desk", "floor lamp")),
        Noun("floor lamp/s", "Stehleuchte/f", "lampadaire/m", (60, 520), (3000, 9000), ("armchair", "table lamp")),
        Noun("wall lamp/s", "Wandleuchte/f", "applique murale/f", (25, 220), (500, 2500), ("spotlight", "table lamp")),
        Noun("ceiling lamp/s", "Deckenleuchte/f", "plafonnier/m", (35, 320), (900, 4500), ("spotlight", "wall lamp")),
        Noun("lantern/s", "Laterne/f", "lanterne/f", (15, 120), (400, 2200), ("garden bench", "wall lamp")),
        Noun("spotlight/s", "Strahler/m", "spot/m", (15, 140), (200, 1200), ("ceiling lamp", "wall lamp")),
    ),
    materials=(
        BRASS,
        ALUMINUM,
        Word("glass", "Glas", "verre"),
        Word("ceramic", "Keramik", "céramique"),
    ),
    features=(
        Word("dimmable", "dimmbar", "=à intensité variable"),
        ADJUSTABLE,
        Word("energy-saving", "energiesparend", "économe"),
        HANDMADE,
        Word("glare-free", "blendfrei", "=anti-éblouissement"),
        TIMELESS,
    ),
    details=(
        Attribute(("Brightness", "Lichtstrom", "Flux lumineux"), same("250 lm", "470 lm", "806 lm", "1100 lm")),
        Attribute(
            ("Light color", "Lichtfarbe", "Teinte de lumière"),
            (
                ("warm white", "warmweiß", "blanc chaud"),
                ("neutral white", "neutralweiß", "blanc neutre"),
                ("daylight", "tageslichtweiß", "lumière du jour"),
            ),
        ),
    ),
    share=3,
)
