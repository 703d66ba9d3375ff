"""Boilerplate: what is, in many languages; what only looks like it; that every pattern is met; that none is slow."""

import re
import time

import pytest

from data_pipelines.curate.boilerplate import _PATTERNS, is_boilerplate
from data_pipelines.curate.captions import UNKNOWN, canonical, text_faults
from data_pipelines.curate.config import CurateConfig
from data_pipelines.sources.webdataset import TarSource
from tests.data_pipelines.shards import SAMPLE

FILES = """
IMG_0042.JPG · img_20190412_103355.jpg · DSC_0042.NEF · my cat.jpeg · /images/cat.png · cat.jpg?width=300
C:\\me\\cat.tiff · File:Cat.jpg · DSC03349 · DSCN0042 · DSCF1234 · _DSC1234 · _MG_5561 · IMG_1234 · IMG_4321 (1)
IMG_4321-1024x768 · IMG_20200101_123456_HDR · IMG_E1234 · IMG-20200101-WA0007 · PXL_20210514_123456789
MVIMG_20190101_101010 · GOPR0123 · GX010123 · DJI_0042 · CIMG0031 · SAM_1234 · HPIM0123 · P1010023 · 100_1234
20180304_152233 · VID_20200101_101010 · FB_IMG_1582910 · 12345678_10150000000000_123456789_n · Picture1 · image001
Screenshot 2020-01-02 at 10.11.12 · Screen Shot 2019-03-04 at 10.22.33 AM · Screenshot_20200101-123456_Chrome
Screenshot (12) · Bildschirmfoto 2020-01-02 um 10.11.12 · Capture d’écran 2020-01-02 à 10.11.12
Captura de pantalla 2020-01-02 a las 10.11.12 · スクリーンショット 2020-01-02 10.11.12
WhatsApp Image 2020-05-01 at 12.30.00 PM (2) · received_1234567890 · Untitled-1 · unnamed (1) · scan0001
my-cat-1024x768 · d41d8cd98f00b204e9800998ecf8427e · 550e8400-e29b-41d4-a716-446655440000 · AAMkADk0YzQ5ZWFhLTE2NDktNGQ4
photo-1502680390469-be75c86b636f · shutterstock_123456789 · iStock-123456 · AdobeStock_12345678 · GettyImages-123456
jpg · image/jpeg · 1024x768 · 1920 x 1080 px · 12/03/2018 · March 3, 2018 · 100% · SKU: 12345 · ISBN 978-3-16-148410-0
data:image/png;base64,iVBORw0KGgo
"""
PAGES = """
image · Image 3 of 25 · image (3) · Image #4 · photo 12 · Pic 4 · 2 of 5 · 3/12 · Page 12 · Slide 3 · Figure 1 · Scan 12
Thumb · thumbnail · Thumbnail image · main image · product photo 2 · User avatar · Profile picture · Cover image
image alt text · alt text · Image Title · icon · no image available · No Picture Available · Image Not Available
Sorry, this image is no longer available · missing image · broken image · Photo coming soon
The image could not be loaded · This image has been removed · No preview available · no-image · noimage · loading...
click here to buy · Click to enlarge · Click on image to enlarge · tap to zoom · View larger image · View full size image
See more photos · Buy now · Add to cart · Quick view · Free shipping on orders over $50! · Sale! · 50% OFF · Sold out
Out of stock · Shop now · Call us today · $24.50 · € 12,99 · 12,99 € · $19.99 buy now · from $9.99
Was $20.00 Now $10.00 · $19.99 - $29.99 · USD 45 · ₹ 499 · Ab 9,99 € · Share on Facebook · Share via Email · Pin it
Tweet this · Follow us on Instagram · twitter icon · Pinterest · Leave a comment · 12 comments · 1 review
4.5 out of 5 stars · Rate this · Posted on 12/03/2018 · Posted on March 3, 2018 · Updated 2 days ago · Posted by admin
by admin · Home · Menu · Next · Previous · Zoom · Close · Read more » · Older posts · Skip to content · Toggle navigation
Sign up today · My account · This website uses cookies to ensure you get the best experience on our website.
We use cookies · Accept all cookies · Privacy Policy · Photo by admin · Photo credit: Reuters · © All rights reserved
Copyright 2019 Some Company · (c) 2010 · © 2019 Getty Images · stock photo · Royalty-free stock vector ID: 44894489
Stock Photo - Image: 4711 · Stock Photo - Image of · Powered by WordPress · Created with GIMP
https://example.com/cat?id=3 · www.shop.com · me@example.com · Tel: 030 123456 · +1 (555) 123-4567 · Untitled · undefined
null · N/A · logo · Lorem ipsum dolor sit amet, consectetur adipiscing elit · [object Object] · placeholder · default
company logo · spacer · Advertisement
"""
LANGUAGES = """
Bild 1 · Kein Bild vorhanden · Bild nicht verfügbar · Foto folgt · In den Warenkorb · Weiterlesen
Zum Vergrößern klicken · Unbenannt · Image non disponible · Pas d'image · Lire la suite · Ajouter au panier · Sans titre
Agrandir l'image · imagen · Imagen no disponible · Sin foto · Leer más · Comprar ahora · Immagine 2
Immagine non disponibile · Leggi tutto · Imagem não disponível · Leia mais · Geen afbeelding beschikbaar · Lees meer
Zdjęcie 3 · Brak zdjęcia · Czytaj więcej · Dodaj do koszyka · foto · Foto 2 · Obrázek 2 · Kuva 1 · Kép · Resim yok
Gambar 2 · фото · Фото 1 · Нет изображения · Фото отсутствует · Читать далее · В корзину · картинка · εικόνα 3 · hình ảnh
รูปภาพ · चित्र 1 · صورة · صورة 1 · תמונה · 画像 · 画像1 · 写真 2 · 続きを読む · カートに入れる · 图片 · 图片1 · 暂无图片
点击放大 · 加入购物车 · 照片 · 이미지 · 사진 3 · 더 보기 · 이미지 없음
"""
# Honest, and odd: what the rules come close to.
HONEST = """
a dog · camera · home · menu · back · map · phone · Stop · house with garden · a menu on a table · next to the river
Home sweet home cross stitch · close-up · Close-up of a bee · play · children play here · zoom lens · search dog
share the road sign · sign up ahead · back of a horse · 猫 · 犬 · 桜 · ネコの写真集 · 写真家 · 画像処理の本 · 图书馆
고양이 · 사진관 · кот · рис · печать · кіт · γάτα · chat · Hund · perro · kočka · kedi · قطة · חתול · बिल्ली · แมว · mèo
kissa · Bilderbuch · Bild eines Hundes · foto de un gato · une photo de famille · immagine della Madonna · zdjęcie psa
фото собаки · 写真を撮る人 · 猫の画像 · a picture of a dog available in red · photo of the old town at night
picture frame · image of the Eiffel Tower · Image of a red car on a road · photo booth · photograph album
a missing dog poster · broken window · broken image of the Buddha · pictures at an exhibition · team in red · thumb up
Image may contain: dog, grass · No smoking sign · no entry sign · no parking · empty bottle · blank paper
unknown soldier · Sorry board game · logo of the Red Cross · C++ logo · Chicago Bulls logo
Facebook headquarters in Menlo Park · Pinterest office · icon of Saint Nicholas · iconic building · banner with stars
slide in a playground · slide · carousel · slider · page boy · cover of a book · profile of a woman · avatar movie poster
mask · header of a football player · file cabinet · a file cabinet · figure skating · frame house · layer cake
item of clothing · background of blue sky · red dress $19.99 · bag for €12 · a $100 bill · 5 euro note
price tag on a shirt · 20 dollars · one dollar · 50 cents stamp · 10 Pfennig · stamp, 5 kr · Sale e pepe
sale sign in a shop window · free range hens · add salt to the soup · buy a house concept · shopping cart
cart drawn by a horse · 5 stars · three stars · 7 dwarfs · 101 Dalmatians · number 4 · the number 4 · 4 kittens
2 of hearts · 3 of clubs · Boeing 747 · Route 66 · Apollo 11 · Nike Air Max 90 · 1984 calendar · Summer of 1969
Portrait [1885] · Portrait of a Lady [1885] · the moon landing, July 1969 · May 1968 in Paris · 4th of July
9/11 memorial · P51 Mustang · P-51 · MiG-29 · DSC racing car · IMG Academy · BMW 2002 · NGC 1300 galaxy · NGC 1300
SAM-7 missile · SAM 7 · MG 1300 · R2-D2 · F-16 · Audi A4 · H2O · C6H12O6 · NaCl · CO₂ molecule · H₂SO₄ · E = mc²
x marks the spot · 5 > 3 · 5 < 6 · <3 my dog · I <3 NY · a <-> b · rose = love · 50% wool sweater · R&D · AT&T
Q&A session · M&Ms · rock & roll · #cat · #nofilter #sunset · @home · "Guernica" · «Мир» · 'Sunflowers' by Van Gogh
(detail) of a fresco · a [broken] vase · cat falls [video] · [sic] · O'Hare · rock 'n' roll · X-ray of a hand · T-shirt
U.S.A. · e-bike · Wi-Fi · 👍 · 🐕 · ♥ · copyright symbol · Foto: Apfel auf dem Tisch · by using flour, she bakes cookies
Contact (1997) · card illustration · Copyright, (c), symbol · trademark sign · powered by wind, a mill · made with love
made with fresh tomatoes · written on a wall · created by hand · taken by surprise · credit card · source of the Nile
via Appia · courtesy car · added 2 eggs · posted guard · follow the leader · stock car racing · stock exchange
vector field plot · vector of forces · royalty on a balcony · download arrow icon green · pixel art of a sword · facade
decade · shield · deadbeef · accede · BeautifulSunsetOverTheOcean2019 · Donaudampfschifffahrtsgesellschaft
antidisestablishmentarianism
"""


def split(block: str) -> list[str]:
    return [text.strip() for line in block.strip().splitlines() for text in line.split(" · ")]


@pytest.mark.parametrize("text", split(FILES) + split(PAGES) + split(LANGUAGES))
def test_boilerplate(text):
    assert is_boilerplate(canonical(text)[0])


@pytest.mark.parametrize("text", split(HONEST))
def test_no_boilerplate(text):
    caption, found = canonical(text)
    faults = text_faults(caption, UNKNOWN, CurateConfig(min_chars=1))
    assert (caption, found, faults) == (text, (), [])


def test_nothing_is_no_boilerplate():
    assert not is_boilerplate("") and not is_boilerplate("…")


@pytest.mark.parametrize("name", _PATTERNS)
def test_every_pattern_has_its_example(name):
    pattern = re.compile(_PATTERNS[name])
    told = [text.lower().replace("_", " ").strip("!.»…[] ") for text in split(FILES) + split(PAGES)]
    assert any(pattern.fullmatch(text) for text in told)


def test_names_of_the_sample_are_none():
    texts = set()
    for pair in TarSource(SAMPLE / "emoji-train-00000.tar"):
        texts.update((pair.fields["txt"], *pair.fields["captions"].values(), *pair.fields["keywords"]))
    assert len(texts) > 10_000
    assert {text for text in texts if is_boilerplate(text)} <= {"next", "share"}  # keywords, not names


@pytest.mark.parametrize(
    "text",
    [
        "$5 , " * 48 + "x", "1 " + "o " * 110 + "xx", "price: " * 30 + "x", "image 1 a.m " * 20 + "xx", "the image " * 24 + "x",
        "5 $ " * 59 + "dog", "posted on 1 " + "2 may " * 30 + "xx", "aA1" * 79 + "!", "© " * 100 + "dog", "photo-" * 39 + ".",
        "a" * 239, "1.1." * 60, "click " * 40,
    ],
)  # fmt: skip
def test_no_caption_takes_long(text):
    began = time.thread_time()
    is_boilerplate(text)
    assert time.thread_time() - began < 0.05
